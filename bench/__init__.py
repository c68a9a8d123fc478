"""Benchmarks, apart from the tests: each prints a table and, as its last line, one JSON object."""
