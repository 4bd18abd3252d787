"""Scores of a model: held-out loss (heldout.py)."""
