"""Typed, frozen, torch-free settings. Flags, YAML keys, help texts and the docs derive from these classes alone."""
