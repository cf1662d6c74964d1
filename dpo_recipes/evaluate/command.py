"""The verb `evaluate`."""

import argparse
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from dpo_recipes.catalog import as_recipe, find_settings
from dpo_recipes.flags import add_sampling, at_least, given
from dpo_recipes.machine import default_profile, gpu_cards, set_environment


def add_parser(commands: Any) -> None:
    """Adds the verb to the subparsers of `dpo-recipes`."""
    parser = commands.add_parser(
        "evaluate",
        help="compare a run or a model with the one that it was trained from",
        usage="%(prog)s RECIPE_OR_MODEL [--judge J] [--dataset_name D] [--max_length 512 ...]",
        epilog="Every other flag is a flag of `train`; a model needs --dataset_name.",
        examples=[
            "evaluate hh-rlhf-lora --judge A_REWARD_MODEL",
            "evaluate outputs/hh_rlhf_lora --dataset_name pairs.jsonl",
        ],
    )
    parser.add_argument("model", metavar="RECIPE_OR_MODEL", help="a recipe, whose run it is, a folder or a Hub name")
    base = "the initial model; by default the one that the recipe or the run names"
    parser.add_argument("--base", metavar="MODEL", help=base)
    parser.add_argument("--judge", metavar="J", help="FILE.py:FUNCTION, a reward model, or https://HOST/v1")
    parser.add_argument("--judge_model", metavar="NAME", help="model of an endpoint; its key is $OPENAI_API_KEY")
    price = "price of a million tokens"
    parser.add_argument("--judge_price", nargs=2, type=at_least(0.0), metavar=("IN", "OUT"), help=price)
    parser.add_argument("--judge_workers", type=at_least(1), metavar="N", help="requests at a time: 8")
    parser.add_argument("--judge_options", type=_json_object, metavar="JSON", help="further fields of a request")
    parser.add_argument("--yes", action="store_true", help="spend what an endpoint costs without asking")
    prompts = "prompts of the held-out pairs to answer: 200"
    parser.add_argument("--prompts", metavar="N", type=at_least(2), default=200, help=prompts)
    parser.add_argument("--output_dir", metavar="DIR", help="a recipe's run; of a model, where the results go")
    parser.add_argument("--profile", metavar="P", help="as in train")
    add_sampling(parser, 1.0)
    parser.set_defaults(call=_evaluate, takes_flags=True)


def _evaluate(options: argparse.Namespace, flags: list[str]) -> None:
    arguments = given(options)
    name = arguments.pop("model")
    recipe = as_recipe(name)
    chosen = arguments.pop("profile", None) or default_profile(gpu_cards())
    profile = find_settings("profiles", chosen, recipe=recipe or Path(name))
    judging = [key for key in arguments if key.startswith("judge_")]
    endpoint = {key.removeprefix("judge_"): arguments.pop(key) for key in judging}
    set_environment()
    from dpo_recipes.evaluate.evaluate import evaluate  # imports torch and TRL
    from dpo_recipes.recipe import run

    run(partial(evaluate, name, recipe=recipe, profile=profile, flags=flags, endpoint=endpoint, **arguments))


def _json_object(text: str) -> dict[str, Any]:
    """Reads a JSON object."""
    with suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError('a JSON object is needed: {"max_tokens": 300}')  # the text may hold a key
