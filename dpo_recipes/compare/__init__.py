"""Trains DPO and its rivals on the same data, and reports which is better."""
