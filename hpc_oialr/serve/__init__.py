"""A trained model in use: evaluation, export, loaders of what was exported."""
