"""The verb `vote`."""

import argparse
import os
from typing import Any

from dpo_recipes.flags import add_sampling, add_trust, at_least, given
from dpo_recipes.machine import set_environment
from dpo_recipes.sample.command import DATASET_FLAGS

PASSWORD = "DPO_RECIPES_VOTE_PASSWORD"


def add_parser(commands: Any) -> None:
    """Adds the verb to the subparsers of `dpo-recipes`."""
    parser = commands.add_parser(
        "vote",
        help="let people judge a run's answers blind, in a browser",
        usage="%(prog)s RUN [--against OTHER] [--result] [--host H --password P] [--dataset_name D]",
        examples=[
            "vote outputs/quickstart",
            "vote outputs/beta03 --against outputs/hh_rlhf_lora --dataset_name pairs.jsonl",
        ],
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    other = "another run, or any model; by default the initial model of RUN"
    parser.add_argument("--against", metavar="OTHER", help=other)
    parser.add_argument("--result", action="store_true", help="write and print the result without a server")
    parser.add_argument("--prompts", metavar="N", type=at_least(1), default=200, help="prompts to show at most: 200")
    parser.add_argument(
        "--host", metavar="H", default="127.0.0.1", help="address to listen on: that of this machine alone"
    )
    parser.add_argument("--port", metavar="N", type=at_least(0), default=7860, help="7860; 0 takes a free one")
    parser.add_argument("--password", metavar="P", help=f"of the voters; better in ${PASSWORD}, which nobody sees")
    parser.add_argument("--dataset_name", metavar="D", help="take prompts of a dataset in place of the run's")
    for name in DATASET_FLAGS[1:]:
        parser.add_argument(f"--{name}", metavar="X", help="as in sample")
    add_sampling(parser, None, words="that of the run's own answers, or else 1.0")
    add_trust(parser)
    parser.set_defaults(call=_vote)


def _vote(options: argparse.Namespace, flags: list[str]) -> None:
    set_environment()
    from dpo_recipes.vote.vote import show_result, vote

    arguments = given(options)
    run, against = arguments.pop("run"), arguments.pop("against", None)
    if arguments.pop("result"):
        show_result(run, against)
        return
    data = {name: arguments.pop(name) for name in DATASET_FLAGS if name in arguments}
    password = arguments.pop("password", None) or os.environ.get(PASSWORD)
    vote(run, against, data=data, password=password, **arguments)
