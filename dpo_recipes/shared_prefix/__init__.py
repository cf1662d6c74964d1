"""Encodes each prompt once for both completions, without padding, to the same loss and gradients."""

from dpo_recipes.shared_prefix.trainer import SharedPrefixDPOTrainer as SharedPrefixDPOTrainer
