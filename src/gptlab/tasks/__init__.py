"""Tasks: what a model learns and how it is scored, for language modelling and classification."""
