"""From files to tokenised examples. Knows no model; nothing is dropped, cut or masked without a count and a reason."""
