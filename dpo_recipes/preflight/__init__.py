"""Accounts for every pair before a model is loaded, and shortens pairs that are too long for it."""

from dpo_recipes.preflight.prepare import prepare_pairs as prepare_pairs
from dpo_recipes.preflight.prepare import prepare_prompts as prepare_prompts
