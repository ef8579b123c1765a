"""Training: typed settings, the loop, evaluation, checkpoints."""
