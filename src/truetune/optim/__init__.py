"""Learning rates and parameter groups."""
