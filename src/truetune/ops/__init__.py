"""Tensors in, tensors out: the formulas, each stated once. No modules, no settings."""
