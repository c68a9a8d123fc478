"""Modules that own packed weights: 4-bit and 8-bit linear layers and tables, in bitsandbytes' formats."""
