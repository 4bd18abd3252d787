"""Training of one run: the loop, checkpoints, logs, throughput and the detection of divergence."""
