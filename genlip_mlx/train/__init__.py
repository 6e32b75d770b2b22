"""Training: objective, optimiser and schedule, trainer, run folder. One trainer for every stage."""
