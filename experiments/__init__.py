"""Experiments: one script and one results file a claim about learning, bytes or privacy."""
