"""Evaluates a model against the model that it was trained from."""
