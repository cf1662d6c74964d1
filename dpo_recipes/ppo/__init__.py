"""Proximal policy optimisation on current TRL: trainer, settings, critic."""

from dpo_recipes.ppo.trainer import PPOConfig as PPOConfig
from dpo_recipes.ppo.trainer import PPOTrainer as PPOTrainer
