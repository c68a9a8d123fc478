"""Tokenising, masking and packing beside ``datasets``; see ``bench/README.md``."""
