"""Run state on disk: atomic, hashed, safetensors and JSON only; nothing is ever unpickled."""
