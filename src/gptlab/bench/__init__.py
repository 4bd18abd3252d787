"""Benchmarks of gptlab's own models."""
