"""Answers over HTTP, as OpenAI's API words them."""
