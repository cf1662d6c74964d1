"""Lets people vote on a run's answers, and writes what their votes say."""

import ipaddress
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import MANIFEST, check_writable, read_json
from dpo_recipes.manifest import claim
from dpo_recipes.terminal import say
from dpo_recipes.vote.answers import load_answers, read_pairs
from dpo_recipes.vote.command import PASSWORD
from dpo_recipes.vote.log import VoteLog


def vote(
    run: str,
    against: str | None,
    *,
    data: Mapping[str, Any],
    host: str,
    port: int,
    password: str | None,
    temperature: float | None = None,
    **options: Any,
) -> None:
    """Serves a page for votes until Ctrl-C, and then writes and prints their result.

    Args:
        run: A run's folder.
        against: A run or model to compare with; None is the run's initial model.
        data: Fields of `RecipeArguments` that name other prompts than the run's.
        host: Address to listen on; one that other machines reach takes a password.
        port: 0 takes a free one.
        password: Of the voters; it is kept in memory alone.
        temperature: Of the answers; None takes that of the run's own.
        options: For `load_answers`.

    Raises:
        RecipeError: If the call is wrong, a library is missing, or there are no answers to compare.
    """
    _require_libraries()
    if not (password or _is_loopback(host)):
        raise RecipeError(
            f"Other machines reach {host}, so voters need a password. Set ${PASSWORD} (or --password), or leave out "
            "--host."
        )
    folder = _folder(run, against)
    check_writable(folder)
    if (Path(run) / MANIFEST).exists():
        claim(run, "votes")
    listener = _listen(host, port)
    log = VoteLog(folder / "votes.jsonl")
    load_answers(run, against, folder / "answers.json", data=data, temperature=temperature, **options)
    pairs, equal = read_pairs(folder / "answers.json")
    if not pairs:
        raise RecipeError(f"Both models give equal answers to all {equal} prompts, so there is nothing to judge.")
    from dpo_recipes.vote.server import serve  # imports Gradio

    left_out = f"; {equal} prompts with equal answers are left out" if equal else ""
    say(f"{len(pairs)} pairs of answers{left_out}; {len(log.votes)} votes so far.")
    if log.torn:
        say(f"{log.torn} lines of {folder / 'votes.jsonl'} were cut short by a kill: these votes are lost.")
    with suppress(KeyboardInterrupt):
        serve(pairs, log, listener, password=password)
    if log.votes:
        say("Writing the result.")
        show_result(run, against)


def show_result(run: str, against: str | None) -> None:
    """Writes the result of the votes so far, and prints it.

    Raises:
        RecipeError: If nobody has been asked.
    """
    _require_libraries()
    folder = _folder(run, against)
    if not (folder / "votes.jsonl").exists():
        raise RecipeError(f"{folder} holds no votes. Let somebody vote first, without --result.")
    from dpo_recipes.vote.results import write_result  # imports torch

    write_result(Path(run), folder.name, against)


def _folder(run: str, against: str | None) -> Path:
    """The folder of the votes of one comparison."""
    if not read_json(Path(run) / "settings.json"):
        raise RecipeError(f"{run} holds no settings.json. Name the folder of a run.")
    return Path(run) / "votes" / (re.sub(r"\W+", "_", against).strip("_") if against else "initial_model")


def _require_libraries() -> None:
    if missing := [name for name in ("gradio", "krippendorff") if find_spec(name) is None]:
        raise RecipeError(f"vote needs {' and '.join(missing)}, not installed here: pip install 'dpo-recipes[vote]'")


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address.

    Raises:
        RecipeError: If the address is taken or is not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise RecipeError(
            f"Cannot listen on {host}, port {port}: {error.strerror}. Name another with --port or --host."
        ) from error
