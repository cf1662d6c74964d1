"""Flags: how their words are read, and the types and groups of flags that several verbs share."""

import argparse
import difflib
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from dpo_recipes.errors import RecipeError
from dpo_recipes.secrecy import hide_flags


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, whose help fits on one screen and ends in examples, and whose errors help."""

    def __init__(self, *, epilog: str = "", examples: Sequence[str] = (), **options: Any) -> None:
        lines = [epilog] if epilog else []
        lines += ["", "Examples:", *(f"  dpo-recipes {words}" for words in examples)] if examples else []
        width = min(100, shutil.get_terminal_size((100, 24)).columns)
        form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=26, width=width)
        options |= dict(epilog="\n".join(lines), formatter_class=form, allow_abbrev=False, add_help=False)
        super().__init__(**options)
        self._positionals = self._optionals  # one list without headings
        self._optionals.title = None
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2. A word that is no verb is compared with the verbs that there are."""
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += did_you_mean(found[1], re.findall(r"[\w-]+", found[2]))
        super().error(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that names the closest of the known words; empty if none is close."""
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def grouped(flags: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag's name without dashes, with its values: `--a 1 --b=2` -> [("a", ["1"]), ("b", ["2"])]."""
    groups: list[tuple[str, list[str]]] = []
    for word in flags:
        name, joined, value = word.partition("=")
        if word.startswith("--"):
            groups.append((name[2:].replace("-", "_"), [value] if joined else []))
        elif groups:
            groups[-1][1].append(word)
    return groups


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The options that have a value, by name, without what `cli` reads itself."""
    read = ("call", "takes_flags", "quiet")
    return {name: value for name, value in vars(options).items() if value is not None and name not in read}


def refuse(parser: argparse.ArgumentParser, flags: Sequence[str], options: argparse.Namespace) -> None:
    """Ends the process with status 2 if there are words that no argument of the parser took."""
    if flags:
        known = [f"--{name}" for name in vars(options)]
        close = did_you_mean(flags[0], known) if flags[0].startswith("--") else ""
        parser.error(f"unrecognized arguments: {' '.join(hide_flags(flags))}.{close}")


def known_settings() -> set[str]:
    """Names of the settings of TRL, transformers and this package, read from their sources.

    An import would take seconds. Some of the names are no settings, which only lets a flag pass to the recipe's own
    parser.
    """
    transformers, trl = (Path(str(spec.origin)).parent for name in ("transformers", "trl") if (spec := find_spec(name)))
    own = Path(__file__).parent
    files = [transformers / "training_args.py", *(trl / "trainer").glob("*_config.py"), trl / "scripts" / "utils.py"]
    files += [own / "recipe.py", own / "ppo" / "config.py"]
    return {name for file in files for name in re.findall(r"^    (\w+):", file.read_text(encoding="utf-8"), re.M)}


def refuse_misspelt(names: Sequence[str], *, also: Sequence[str] = (), source: str = "") -> None:
    """Raises RecipeError for the name of a flag that is close to that of a setting, before a library is imported.

    Args:
        names: Names of flags, without dashes.
        also: Names that the command itself takes.
        source: Text of the recipe, which may bring settings of its own: a name that stands in it passes.
    """
    known = {*known_settings(), *also}
    for flag in names:
        *stage, name = flag.rpartition(".")  # of a comparison: --dpo.max_steps
        is_known = name in known or name.removeprefix("no_") in known or re.search(rf"\b{re.escape(name)}\b", source)
        if not is_known and (close := difflib.get_close_matches(name, known, n=2, cutoff=0.8)):
            meant = " or ".join(f"--{''.join(stage)}{each}" for each in close)
            raise RecipeError(f"There is no setting --{flag}. Did you mean {meant}?")


def add_sampling(parser: argparse.ArgumentParser, temperature: float | None, most: int = 256, words: str = "") -> None:
    """Adds the flags of sampled answers, by default at a temperature that `words` describe, of `most` new tokens."""
    words = f"{words or temperature}; 0 is greedy"
    parser.add_argument("--temperature", metavar="T", type=at_least(0.0), default=temperature, help=words)
    words = f"where an answer is cut: {most}"
    parser.add_argument("--max_new_tokens", metavar="N", type=at_least(1), default=most, help=words)
    parser.add_argument("--seed", metavar="N", type=at_least(0), default=0, help="of the sampling: 0")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds --trust_remote_code."""
    words = "let code that comes with the model run; no file can allow that"
    parser.add_argument("--trust_remote_code", **YES_OR_NO, help=words)


def at_least(least: float) -> Callable[[str], float]:
    """A type of numbers: the type of `least`, and no smaller than it."""

    def number(text: str) -> float:
        value = type(least)(text)
        if not value >= least:
            raise ValueError
        return value

    return number


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A type of lists: different values with commas between them."""

    def values(text: str) -> list[Any]:
        found = [kind(word.strip()) for word in text.split(",")]
        if len({*found}) < len(found):
            raise ValueError
        return found

    return values


def says_no(word: object) -> bool:
    """Returns True for a word by which transformers' parser understands no, whatever its case."""
    return str(word).lower() in ("false", "f", "no", "n", "0")


def true_or_false(text: str) -> bool:
    """The truth value that the word names."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}, needs true or false")
    return text == "true"


YES_OR_NO: dict[str, Any] = dict(nargs="?", type=true_or_false, const=True, default=False, metavar="true")
"""Arguments of `add_argument` for a flag that may stand alone, which says true."""
