"""Begins and ends a training run: settings, measurements before and after, curves, model card and page."""

from dpo_recipes.runs.run import finish_run as finish_run
from dpo_recipes.runs.run import start_run as start_run
