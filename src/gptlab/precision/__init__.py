"""Precision regimes, and the optional libraries for low-precision formats."""
