"""What a run says."""

import os
import sys


def say(text: str) -> None:
    """Write to standard output at once, from the main process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
