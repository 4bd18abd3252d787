"""Pruning during training: which weights are masked, when, and how the masks are stored."""
