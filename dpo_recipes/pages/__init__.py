"""Fills the templates of all pages."""
