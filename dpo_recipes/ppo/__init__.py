"""Proximal policy optimisation on current TRL: the trainer and its settings."""

from dpo_recipes.ppo.config import PPOConfig as PPOConfig
from dpo_recipes.ppo.rloo import RLOOTrainer as RLOOTrainer
from dpo_recipes.ppo.trainer import PPOTrainer as PPOTrainer
