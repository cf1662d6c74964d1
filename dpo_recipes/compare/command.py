"""The verb `compare`."""

import argparse
from functools import partial
from typing import Any

from dpo_recipes.flags import at_least, given, listed
from dpo_recipes.launch.sweep import spelling
from dpo_recipes.machine import set_environment


def add_parser(commands: Any) -> None:
    """Adds the verb to the subparsers of `dpo-recipes`."""
    parser = commands.add_parser(
        "compare",
        help="train a recipe and its rivals on the same data, and report",
        usage="%(prog)s RECIPE [--quick] [--methods dpo,rounds,ppo] [--seeds 0,1,2] [--betas X,Y]",
        epilog="Every other flag is a TRL argument: --max_length 512 for all, --ppo.learning_rate 1e-5 for one.",
        examples=["compare quickstart --quick", "compare hh-rlhf-lora --methods dpo,ppo,rloo --profile gpu"],
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a DPO recipe; NAME_reward, NAME_ppo and so on stand beside it"
    )
    parser.add_argument("--quick", action="store_true", help="one beta, one seed")
    parser.add_argument("--methods", type=listed(str), metavar="A,B", help="dpo,rounds,ppo; there is rloo, too")
    parser.add_argument("--seeds", type=listed(int), metavar="N,N", help="0,1,2")
    parser.add_argument("--betas", type=listed(spelling), metavar="X,Y", help="by default the DPO recipe's own")
    parser.add_argument("--prompts", metavar="N", type=at_least(2), help="prompts of the test split to answer: 200")
    parser.add_argument("--judge", metavar="MODEL", help="a reward model or classifier; by default the recipe's own")
    parser.add_argument("--output_dir", metavar="DIR", help="by default outputs/compare/RECIPE")
    parser.add_argument("--profile", metavar="P", help="as in train")
    parser.add_argument("--accelerate", metavar="A", help="as in train")
    parser.set_defaults(call=_compare, takes_flags=True)


def _compare(options: argparse.Namespace, flags: list[str]) -> int:
    set_environment()
    from dpo_recipes.compare.compare import compare  # imports torch and TRL
    from dpo_recipes.recipe import run

    arguments = given(options)
    return run(partial(compare, arguments.pop("recipe"), flags=flags, **arguments))
