"""What a run says."""

import os
import sys


def say(text: str) -> None:
    """Write to standard output at once, from the main process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person would say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
