"""Scores of a model on text, and lm-evaluation-harness."""
