"""Quantised bases and 8-bit optimizers, beside bitsandbytes: ``python -m bench.quant``. See ``bench/README.md``."""
