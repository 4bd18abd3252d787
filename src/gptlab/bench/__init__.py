"""Benchmarks of what gptlab does with a model, by precision regime."""
