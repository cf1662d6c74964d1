"""Preference tuning with TRL: dataset adapters, presets, guards and recipes."""

__version__ = "0.1.0"
