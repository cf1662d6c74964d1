"""Watches a run: rules with a remedy each, and guards that refuse to train from a wrong or broken model."""

from dpo_recipes.health.callback import HealthCallback as HealthCallback
