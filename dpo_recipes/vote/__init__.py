"""Lets people judge answers blind in a browser; their votes are a win rate and pairs for a next round."""
