"""Trains DPO, DPO in rounds, PPO and RLOO on the same data, and reports which is better."""
