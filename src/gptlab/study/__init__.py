"""Studies: every arm with every seed, each run in a process of its own; and jobs of SLURM or in the background."""
