"""Publishes a finished run at the Hub, and checks that an exported model is asked with its own chat template."""
