"""The command `dpo-recipes`: each verb's room adds its parser; only verbs that need torch import it, when they run."""

import os
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dpo_recipes import __version__, catalog
from dpo_recipes.compare import command as compare
from dpo_recipes.doctor import command as doctor
from dpo_recipes.errors import RecipeError
from dpo_recipes.evaluate import command as evaluate
from dpo_recipes.flags import Parser, grouped, refuse, refuse_misspelt
from dpo_recipes.launch import command as launch
from dpo_recipes.models import command as models
from dpo_recipes.publish import command as publish
from dpo_recipes.sample import command as sample
from dpo_recipes.secrecy import hide, secrets_of
from dpo_recipes.terminal import QUIET, outlive_the_terminal, quiet_libraries, runnable
from dpo_recipes.vote import command as vote

OF_RECIPES = ("copy", "train", "inspect", "evaluate", "compare")
"""Verbs whose first word may be the name of a recipe."""
AT_ONCE = ("list", "copy", "page", "try", "completion")
"""Verbs that have no --quiet: they are short, or print what they are asked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 the work failed, 2 the call was wrong, 128 + a signal."""
    parser, words = build_parser(), [*(sys.argv[1:] if arguments is None else arguments)]
    if "--quiet" in words:
        os.environ[QUIET] = "1"
    quiet_libraries()
    outlive_the_terminal()
    if words[:1] == ["train"] and {"-h", "--help"} & {*words[2:]}:
        return launch.show_settings(words[1])
    options, flags = parser.parse_known_args(words)
    if not options.takes_flags:
        refuse(parser, flags, options)
    secrets = secrets_of(words)
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
    swept = [word.partition("=")[0] for word in getattr(options, "sweep", None) or ()]
    recipe = next((getattr(options, key) for key in ("recipe", "data", "model") if hasattr(options, key)), "")
    source = ""
    with suppress(RecipeError, OSError, UnicodeDecodeError):
        source = catalog.find_recipe(str(recipe)).read_text(encoding="utf-8")
    refuse_misspelt([*dict(grouped(flags)), *swept], also=[*vars(options), "config", "help"], source=source)


def build_parser() -> Parser:
    """The parser of all verbs.

    Its result holds `call`, a function of the options and of the words that no argument took, and `takes_flags`, False
    for a verb that refuses such words.
    """
    parser = Parser(
        prog="dpo-recipes",
        usage="%(prog)s COMMAND ... | --version",
        description="Preference tuning with TRL. COMMAND --help shows a command's flags and examples:",
        examples=["train quickstart"],
    )
    parser.add_argument("--version", action="version", version=f"dpo-recipes {__version__}", help=SUPPRESS)
    parser.set_defaults(call=lambda options, flags: parser.print_help(), takes_flags=False)
    commands: Any = parser.add_subparsers(metavar="COMMAND is one of", prog=parser.prog, parser_class=Parser)
    for room in (catalog, launch, evaluate, compare, sample, vote, models, publish, doctor):
        room.add_parser(commands)
    words = "print a script that completes commands, flags and recipes"
    completing = commands.add_parser("completion", help=words, examples=["completion bash >>~/.bashrc"])
    completing.add_argument("shell", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")
    completing.set_defaults(call=lambda options, flags: sys.stdout.write(_completion(parser, options.shell)) and 0)
    for name, verb in commands.choices.items():
        if name not in AT_ONCE:
            words = "print warnings, errors and the last line alone"
            verb.add_argument("--quiet", action="store_true", help=words)
    return parser


def _completion(parser: Parser, shell: str) -> str:
    """A script for the shell, which asks `dpo-recipes list` for the recipes."""
    import shtab

    kinds = ("profiles", "accelerate")
    listed = {kind: _words_or_files(kind, " ".join(["printf '%s\\n'", *catalog.names_of(kind)])) for kind in kinds}
    recipes = _words_or_files("recipes", f"{parser.prog} list | cut -d' ' -f3")
    [verbs] = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    for name, verb in verbs.items():
        for action in verb._actions:
            if action.dest in ("profile", "accelerate"):
                action.complete = listed[action.dest.replace("profile", "profiles")]
            elif action.dest in ("recipe", "data", "model", "run") and not action.option_strings:
                action.complete = recipes if name in OF_RECIPES else shtab.DIRECTORY
    return str(shtab.complete(parser, shell))


def _words_or_files(name: str, command: str) -> dict[str, Any]:
    """Returns what shtab takes as the completion of an argument: the words that a command prints, and files."""
    name = f"_dpo_recipes_{name}"
    functions = {
        "bash": f'{name}() {{ compgen -W "$({command})" -- "$1"; compgen -f -- "$1"; }}\n',
        "zsh": f"{name}() {{ compadd -- $({command}); _files; }}\n",
    }
    fish = f"({command}; __fish_complete_path)"
    return {"bash": name, "zsh": name, "fish": fish, "preamble": functions}
