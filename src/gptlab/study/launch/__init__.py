"""Runs and studies as jobs: on a SLURM cluster, or in the background of this machine."""
