"""Starts training: the command, its processes and sweeps over settings."""
