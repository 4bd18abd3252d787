"""A task is what is learnt and how it is scored: language modelling (lm.py)."""
