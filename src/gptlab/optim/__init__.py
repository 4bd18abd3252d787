"""Parameter groups, optimizers (optimizers.py) and learning-rate schedules (schedule.py)."""
