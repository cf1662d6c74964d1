"""The verb `vote`."""

import argparse
import os
from typing import Any

from dpo_recipes.flags import add_sampling, add_trust, at_least, given
from dpo_recipes.machine import set_environment

PASSWORD = "DPO_RECIPES_VOTE_PASSWORD"
DATASET_FLAGS = ("dataset_name", "dataset_config", "dataset_train_split", "columns")


def add_parser(commands: Any) -> None:
    """Adds the verb to the subparsers of `dpo-recipes`."""
    parser = commands.add_parser("vote", help="let people judge a run's answers blind, in a browser")
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    other = "another run, or any model; by default the initial model of RUN"
    parser.add_argument("--against", metavar="OTHER", help=other)
    parser.add_argument("--result", action="store_true", help="write and print the result without a server")
    parser.add_argument("--prompts", type=at_least(1), default=200, help="prompts to show at most: 200")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=at_least(0), default=7860, help="7860; 0 takes a free one")
    parser.add_argument("--password", help=f"of the voters; better in ${PASSWORD}, which no list of processes shows")
    for name in DATASET_FLAGS:
        parser.add_argument(f"--{name}", help="prompts of a dataset in place of the run's, as in sample")
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
