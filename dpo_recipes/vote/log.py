"""The votes on disk: a file that only grows, by a line that is on the disk before the voter sees the next pair."""

import fcntl
import json
import os
import threading
from collections import defaultdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from dpo_recipes.errors import RecipeError

SIDES = ("before", "after")  # the initial model, or OTHER, and the run's model
CHOICES = (*SIDES, "tie", "both bad", "skip")
UNDO = "undo"
QUESTIONS = {"helpful": "More helpful", "harmless": "More harmless", "instructions": "Follows the prompt better"}
Vote = dict[str, Any]


class VoteLog:
    """The file of votes, which one process writes at a time, and its votes in order.

    Raises:
        RecipeError: If another process writes it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(f"Another `vote` command writes {path}. Stop it first, or vote there.") from error
        self.votes, self.torn = read_votes(path)
        self._lock = threading.Lock()
        if (data := path.read_bytes()) and not data.endswith(b"\n"):
            self._write(b"\n")  # the line that a kill cut short stays as it is

    def append(self, **vote: Any) -> None:
        """Adds a vote and returns once it is on the disk. Where the disk is full the file stays as it was."""
        vote["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock:
            self._write(f"{json.dumps(vote, ensure_ascii=False)}\n".encode())
            self.votes.append(vote)

    def _write(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError("The disk is full.")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise


def read_votes(path: Path) -> tuple[list[Vote], int]:
    """The votes of a file in order, and the number of lines that a kill cut short."""
    votes, torn = [], 0
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            vote = json.loads(line) if line else {}
            if {"voter", "pair", "vote"} <= vote.keys():
                votes.append(vote)
        except ValueError:
            torn += 1
    return votes, torn


def standing(votes: list[Vote]) -> dict[tuple[str, str], Vote]:
    """The vote that counts of each voter on each pair, the last one, in the order in which they were cast."""
    found: dict[tuple[str, str], Vote] = {}
    for vote in votes:
        key = (vote["voter"], vote["pair"])
        found.pop(key, None)
        if vote["vote"] != UNDO:
            found[key] = vote
    return found


def repeats(votes: list[Vote]) -> dict[str, int]:
    """Numbers of votes on a pair that its voter had judged before: `changed` to another choice, or `same` again."""
    cast = defaultdict[tuple[str, str], list[str]](list)
    for vote in votes:
        if vote["vote"] != UNDO:
            cast[vote["voter"], vote["pair"]].append(vote["vote"])
    same = [one == other for choices in cast.values() for one, other in pairwise(choices)]
    return {"changed": same.count(False), "same": same.count(True)}
