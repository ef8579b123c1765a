"""Hyperparameter search: trials of a recipe as jobs, chosen and stopped early by Optuna."""
