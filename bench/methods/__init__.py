"""Every tuning method beside PEFT's: ``python -m bench.methods``. See ``bench/README.md``."""
