"""OIALR beside everything a user could pick instead: same models, data, schedule and tuning for all sides."""
