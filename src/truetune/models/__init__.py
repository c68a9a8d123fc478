"""Models and tokenizers of transformers; no other room imports that library."""
