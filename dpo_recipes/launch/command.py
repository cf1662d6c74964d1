"""The verbs around one run: inspect, train, page."""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from dpo_recipes.catalog import as_recipe, find_recipe, find_settings
from dpo_recipes.flags import YES_OR_NO
from dpo_recipes.launch.launch import prepare
from dpo_recipes.launch.machines import read_machines
from dpo_recipes.launch.sweep import sweep
from dpo_recipes.machine import BFLOAT16, card_memory, default_profile, gpu_cards, set_environment


def add_parser(commands: Any) -> None:
    """Adds the verbs to the subparsers of `dpo-recipes`."""
    inspecting = commands.add_parser(
        "inspect",
        help="look at the data of a recipe, or at any pairs, before training",
        usage="%(prog)s RECIPE_OR_DATASET [--gpu 24GB] [--max_length 512 ...]",
        epilog="Every other flag is a flag of `train`; a dataset needs --model_name_or_path.",
        examples=[
            "inspect hh-rlhf-lora",
            "inspect hh-rlhf-lora --gpu 24GB --max_length 512",
            "inspect pairs.jsonl --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct",
        ],
    )
    inspecting.add_argument("data", metavar="RECIPE_OR_DATASET", help="a recipe, a file, a folder or a Hub name")
    inspecting.add_argument("--gpu", metavar="24GB", help="the card to fit; by default this machine")
    inspecting.add_argument("--with_model", **YES_OR_NO, help="load the model for off-distribution pairs")
    inspecting.add_argument("--profile", metavar="P", help="as in train; by default what the machine or --gpu has")
    inspecting.set_defaults(call=_inspect, takes_flags=True)

    training = commands.add_parser(
        "train",
        help="train a recipe, and the stages it starts from",
        usage="%(prog)s RECIPE [--profile P] [--beta 0.3 --max_steps 100 ...]",
        epilog="Every other flag is a TRL argument and goes to the recipe, where it beats the profile and RECIPE.\n"
        "With the name of a recipe, --help lists all of its settings.",
        examples=[
            "train quickstart",
            "train hh-rlhf-lora --help",
            "train hh-rlhf-lora --profile gpu --beta 0.3 --output_dir outputs/beta03",
            "train hh-rlhf-lora --sweep beta=0.05,0.1,0.3 --quiet",
            "train preference-lora --dataset_name pairs.jsonl --dry_run true",
        ],
    )
    training.add_argument("recipe", metavar="RECIPE", help="a name from `dpo-recipes list`, or the path of your own")
    profile = "cpu, turing, local, gpu or a YAML file; by default what the machine has"
    training.add_argument("--profile", metavar="P", help=profile)
    training.add_argument("--accelerate", metavar="A", help="cpu2, multi_gpu, fsdp2, zero3, ... or a YAML file")
    training.add_argument("--machines", type=int, metavar="N", help="train on N machines, by this call on each of them")
    training.add_argument("--rank", type=int, metavar="R", help="with --machines: this machine's number, 0 to N - 1")
    training.add_argument("--main", metavar="HOST:PORT", help="with --machines: the address of the machine of rank 0")
    training.add_argument("--sweep", nargs="+", metavar="KEY=A,B", help="train with every combination of these values")
    training.set_defaults(call=_train, takes_flags=True)

    words = "write a run's curves, model card and page again"
    paging = commands.add_parser("page", help=words, examples=["page outputs/hh_rlhf_lora"])
    paging.add_argument("run", metavar="RUN", help="a run's folder")
    paging.set_defaults(call=_page)


def show_settings(name: str) -> int:
    """Lists the settings of a recipe, from its own parser, and returns the exit status."""
    return subprocess.run([sys.executable, str(find_recipe(name)), "--help"]).returncode


def _inspect(options: argparse.Namespace, flags: list[str]) -> None:
    recipe = as_recipe(options.data)
    card = card_memory(options.gpu) if options.gpu else 0
    profile = options.profile or default_profile([(card, BFLOAT16)] if card else gpu_cards())
    profile_file = find_settings("profiles", profile, recipe=recipe or Path(options.data))
    set_environment()
    from dpo_recipes.preflight.inspect import inspect  # imports torch and TRL
    from dpo_recipes.recipe import run

    device = (f"the {options.gpu} card", card * 2**20) if card else None
    at: dict[str, Any] = dict(recipe=recipe, profile=profile_file, card=device, with_model=options.with_model)
    run(partial(inspect, options.data, flags=flags, **at))


def _train(options: argparse.Namespace, flags: list[str]) -> int:
    machines = read_machines(options.machines, options.rank, options.main)
    settings = dict(profile=options.profile, accelerate=options.accelerate)
    launch = prepare(options.recipe, **settings, machines=machines, flags=flags)
    return sweep(launch, options.sweep) if options.sweep else launch.run()


def _page(options: argparse.Namespace, flags: list[str]) -> None:
    from dpo_recipes.runs.page import remake  # imports torch

    remake(options.run)
