"""The verbs `merge` and `try`."""

import argparse
from functools import partial
from typing import Any

from dpo_recipes.flags import add_sampling, add_trust, given, refuse
from dpo_recipes.machine import set_environment


def add_parser(commands: Any) -> None:
    """Adds the verbs to the subparsers of `dpo-recipes`."""
    words = "make a full model of a run's LoRA adapter"
    merging = commands.add_parser("merge", help=words, examples=["merge outputs/hh_rlhf_lora"])
    merging.add_argument("run", metavar="RUN", help="the folder of a run that left a LoRA adapter")
    merging.add_argument("--output_dir", metavar="DIR", help="by default RUN_merged")
    merging.add_argument("--base", metavar="MODEL", help="where the model that it was trained on is elsewhere now")
    add_trust(merging)
    merging.set_defaults(call=_merge)

    trying = commands.add_parser(
        "try",
        help="ask a run's model and the one it was trained from, side by side",
        examples=['try outputs/hh_rlhf_lora "How do I boil an egg?"', "try outputs/hh_rlhf_lora --temperature 0"],
    )
    trying.add_argument("run", metavar="RUN", help="a run's folder")
    trying.add_argument("prompt", nargs="?", metavar="PROMPT", help="without it each line typed or piped in")
    trying.add_argument("--base", metavar="MODEL", help="the initial model; by default the one that the run names")
    trying.add_argument("--system", metavar="TEXT", help="a system message in front of the prompt")
    add_trust(trying)
    add_sampling(trying, 0.7)
    trying.set_defaults(call=partial(_try, trying), takes_flags=True)


def _merge(options: argparse.Namespace, flags: list[str]) -> None:
    set_environment()
    from dpo_recipes.models.merge import merge  # imports torch

    merge(**given(options))


def _try(parser: argparse.ArgumentParser, options: argparse.Namespace, flags: list[str]) -> None:
    if options.prompt is None and flags and not flags[0].startswith("-"):
        options.prompt = flags.pop(0)  # argparse takes no optional word behind a flag
    refuse(parser, flags, options)
    set_environment()
    from dpo_recipes.models.chat import try_run  # imports torch

    try_run(**given(options))
