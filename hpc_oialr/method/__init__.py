"""OIALR: the controller, its rules for r, and the stability of a basis."""
