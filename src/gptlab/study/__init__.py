"""Studies at work: every arm with every seed, each run in a process of its own."""
