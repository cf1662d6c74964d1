"""Writes to the terminal: control characters spelt out, from one process, and without failing if nobody reads."""

import os
import re
import shutil
import sys
from contextlib import suppress
from typing import Any

# Characters that move the cursor, change colours or direction, or cannot be encoded; no tabs, no line breaks.
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def shown(text: str) -> str:
    """The text with its control characters spelt out: a terminal or a page shows them and does not obey them."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def this_python() -> str:
    """The path of this Python, from the current folder where that is shorter."""
    return min(sys.executable, os.path.relpath(sys.executable), key=len)


def runnable(text: str) -> str:
    """The text as `shown` has it, with the command `dpo-recipes VERB` as the user's shell finds it."""
    ours = "dpo-recipes" if shutil.which("dpo-recipes") else f"{this_python()} -m dpo_recipes"
    return re.sub(r"(?<![\w./-])dpo-recipes(?= [a-z])", ours, shown(text))


def say(text: str) -> None:
    """Writes to standard output at once, from the main process only, as `runnable` has it."""
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(f"{runnable(text)}\n")
        sys.stdout.flush()


class Unbroken:
    """A stream that drops text it cannot write: to a terminal that was closed, a pipe without a reader, a full disk.

    Every other attribute is the attribute of the stream that it wraps.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Returns the length of the text, written or dropped."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes the text that is held back, if it can be written."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the wrapped stream."""
        return getattr(self._stream, name)


def outlive_the_terminal() -> None:
    """Lets this process go on with its work when nobody reads its output any more."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None and not isinstance(stream, Unbroken):
            setattr(sys, name, Unbroken(stream))


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours, whichever is easiest to read."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
