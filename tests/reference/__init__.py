"""Slow, obvious re-statements in float64, which the library is compared with."""
