"""Training: the loop (loop.py) and what it works with: checkpoints, logs, throughput, the stop signal."""
