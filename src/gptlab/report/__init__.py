"""What finished and running runs have to say: plots and a card for each; it reads run directories and nothing else."""
