"""Writes to the terminal: control characters spelt out, from one process, and without failing if nobody reads."""

import logging
import os
import re
import shutil
import sys
import time
import warnings
from contextlib import suppress
from typing import Any

# Characters that move the cursor, change colours or direction, or cannot be encoded; no tabs, no line breaks.
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
_CODE = re.compile("\\x1b\\[[0-9;?]*[A-Za-z]")  # by which a program colours text and moves the cursor
_COLOUR = re.compile("\\x1b\\[[0-9;]*m")
_TIME = re.compile(r"\d:\d\d")  # in every state of a bar of tqdm
QUIET = "DPO_RECIPES_QUIET"  # set by --quiet, also for the processes that a command starts
EVERY = 10.0  # seconds between two lines of a progress bar that is written to a file


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


def say(text: str, *, always: bool = False) -> None:
    """Writes to standard output at once, from the main process only, as `runnable` has it.

    Args:
        text: One or more lines.
        always: A warning, or the last line of a command's work, which --quiet leaves.
    """
    if int(os.environ.get("RANK", "0")) == 0 and (always or not is_quiet()):
        stream = sys.stdout.stream if isinstance(sys.stdout, Silent) else sys.stdout
        stream.write(f"{runnable(text)}\n")
        stream.flush()


def is_quiet() -> bool:
    """Returns True under --quiet."""
    return bool(os.environ.get(QUIET))


class Unbroken:
    """A stream that drops text it cannot write: to a terminal that was closed, a pipe without a reader, a full disk.

    Every other attribute is the attribute of the stream that it wraps. With NO_COLOR in the environment it writes no
    colours (no-color.org).
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Returns the length of the text, written or dropped."""
        with suppress(OSError):
            self.stream.write(_COLOUR.sub("", text) if os.environ.get("NO_COLOR") else text)
        return len(text)

    def flush(self) -> None:
        """Writes the text that is held back, if it can be written."""
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the wrapped stream."""
        return getattr(self.stream, name)


class Silent(Unbroken):
    """Standard output under --quiet: `say` alone writes to the stream below it."""

    def write(self, text: str) -> int:
        """Returns the length of the text, which is dropped."""
        return len(text)


class Lines(Unbroken):
    """A stream to a file or a pipe: no control codes, and of a progress bar a line after ten seconds without any."""

    _last = time.monotonic()  # of a line in any of these streams

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._bar: str | None = None  # the last state of a bar, empty when it has erased itself; None after other text
        self._returned = False  # the last character was a carriage return

    def write(self, text: str) -> int:
        """Returns the length of the text. Text that is no bar is written at once."""
        for part in filter(None, re.split("(\r\n|\r|\n)", _CODE.sub("", text))):
            if self._returned and (not part.strip(" ") or _TIME.search(part)):
                self._bar = part.strip()
                self._show_bar()
            elif part != "\r":
                self._show_bar()
                if self._bar is None or part.strip("\r\n"):  # else the end of the bar's line
                    super().write(part)
                    Lines._last = time.monotonic()
                self._bar = None
            self._returned = part == "\r"
        return len(text)

    def _show_bar(self) -> None:
        if self._bar and time.monotonic() - self._last >= EVERY and not is_quiet():
            super().write(f"{self._bar}\n")
            Lines._last = time.monotonic()


def outlive_the_terminal() -> None:
    """Lets this process go on with its work when nobody reads its output any more, and writes plain lines to a file.

    Under --quiet nothing but `say` writes to standard output, and standard error shows no progress bar.
    """
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None and not isinstance(stream, Unbroken):
            setattr(sys, name, Unbroken(stream) if stream.isatty() and not is_quiet() else Lines(stream))
    if is_quiet() and not isinstance(sys.stdout, Silent):
        sys.stdout = Silent(sys.stdout)


def quiet_libraries() -> None:
    """Leaves out lines of libraries that look like errors and are none."""
    # trl 1.16 sets, and peft 0.21 reads, the old names of what transformers 5.23 calls activation checkpointing.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing(_\w+)?` is", FutureWarning)
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_about_a_new_head)
    # Checkpoints that are less than a second apart are put in order by their numbers, which is right.
    logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime may not be" not in str(record.msg))


def _is_not_about_a_new_head(record: logging.LogRecord) -> bool:
    """Returns False for the report that a language model has another head than the reward model made of it."""
    report = _CODE.sub("", str(record.msg))
    rows = {tuple(map(str.strip, row.split("|")[:2])) for row in report.splitlines() if "|" in row}
    of_heads = {("Key", "Status"), ("score.weight", "MISSING"), ("lm_head.weight", "UNEXPECTED")}
    return "LOAD REPORT" not in report or not rows <= of_heads


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours, whichever is easiest to read."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
