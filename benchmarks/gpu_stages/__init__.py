"""The stages of `benchmarks/gpu.py`, each of them a program of its own: `python -m gpu_stages.facts --help`."""
