"""The command `dpo-recipes`: each verb's room adds its parser; only verbs that need torch import it, when they run."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from dpo_recipes import __version__, catalog
from dpo_recipes.compare import command as compare
from dpo_recipes.doctor import command as doctor
from dpo_recipes.errors import RecipeError
from dpo_recipes.evaluate import command as evaluate
from dpo_recipes.flags import grouped, refuse, refuse_misspelt
from dpo_recipes.launch import command as launch
from dpo_recipes.models import command as models
from dpo_recipes.publish import command as publish
from dpo_recipes.sample import command as sample
from dpo_recipes.secrecy import hide, secrets_of
from dpo_recipes.terminal import outlive_the_terminal, quiet_libraries, runnable
from dpo_recipes.vote import command as vote


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 the work failed, 2 the call was wrong, 128 + a signal."""
    quiet_libraries()
    outlive_the_terminal()
    parser = build_parser()
    options, flags = parser.parse_known_args(arguments)
    if not options.takes_flags:
        refuse(parser, flags)
    secrets = secrets_of(sys.argv if arguments is None else arguments)
    try:
        if options.takes_flags:
            _check_names(options, flags)
        return options.call(options, flags) or 0
    except RecipeError as error:
        sys.stderr.write(f"dpo-recipes: {runnable(hide(str(error), secrets))}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _check_names(options: Namespace, flags: Sequence[str]) -> None:
    """Raises RecipeError for a misspelt flag, or key of a sweep."""
    names = [name for name, _ in grouped(flags)] + [
        word.partition("=")[0] for word in getattr(options, "sweep", None) or ()
    ]
    recipe = next((getattr(options, key) for key in ("recipe", "data", "model") if hasattr(options, key)), "")
    source = ""
    with suppress(RecipeError, OSError, UnicodeDecodeError):
        source = catalog.find_recipe(str(recipe)).read_text(encoding="utf-8")
    refuse_misspelt(names, also=[*vars(options), "config", "help"], source=source)


def build_parser() -> ArgumentParser:
    """The parser of all verbs.

    Its result holds `call`, a function of the options and of the words that no argument took, and `takes_flags`, False
    for a verb that refuses such words.
    """
    parser = ArgumentParser(prog="dpo-recipes", description="Preference tuning with TRL.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dpo-recipes {__version__}")
    parser.set_defaults(call=lambda options, flags: parser.print_help(), takes_flags=False)
    subparser: Any = partial(ArgumentParser, allow_abbrev=False)  # argparse's stubs want a class
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=subparser)
    for room in (catalog, launch, evaluate, compare, sample, vote, models, publish, doctor):
        room.add_parser(commands)
    return parser
