"""Configs of other programs, read as settings of ours: one file per program, each a table of what its keys mean."""
