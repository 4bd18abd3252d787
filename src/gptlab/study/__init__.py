"""Studies: every arm with every seed, each run in its own process, on this machine or on a cluster."""
