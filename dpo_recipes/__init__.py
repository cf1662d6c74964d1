"""Preference tuning with TRL: dataset adapters, presets, guards and recipes."""

import logging

__version__ = "0.1.0"

# At its import bitsandbytes 0.50.2 warns that a kernel for some CPUs is not installed; it works without it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
