"""Reports, plots and cards of finished and running runs, made from run directories only."""
