"""What a run says."""

import os
import re
import sys

# What moves the cursor, changes colours, turns the writing direction or cannot be encoded; not tabs and line breaks.
_CONTROL = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def shown(text: str) -> str:
    """The text with its control characters spelt out: a terminal or a page shows them and does not obey them."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """Write to standard output at once, from the main process only; control characters are spelt out."""
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(f"{shown(text)}\n")
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person would say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
