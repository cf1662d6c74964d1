"""A disk of its own that is soon full."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, *, size: str) -> Iterator[Path]:
    """Mounts a disk of that size, such as 16m, at a new folder, and skips the test where that is not allowed."""
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("only root can mount a disk of its own")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
