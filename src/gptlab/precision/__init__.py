"""Precision policies: what is stored and multiplied in which format (regimes.py)."""
