"""Watches a run: rules with a remedy each, and guards that refuse a wrong start."""

from dpo_recipes.health.callback import HealthCallback as HealthCallback
