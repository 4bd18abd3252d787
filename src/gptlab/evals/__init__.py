"""Evaluation of a trained model: held-out loss, HellaSwag, perplexity, lm-eval's tasks, classification."""
