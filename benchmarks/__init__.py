"""Benchmarks: one script a claim about speed; `--json` prints one object."""
