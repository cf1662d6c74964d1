"""Writes answers of a model: pairs for a next round, or the files that public benchmarks judge."""
