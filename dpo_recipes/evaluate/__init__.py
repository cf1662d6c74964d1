"""Evaluates a tuned model against its reference model."""
