"""Opens, merges, checks and asks models: generation, log-probs, rewards, checkpoints, token ids of pairs."""
