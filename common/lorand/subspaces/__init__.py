"""Subspaces in which directions act, and how their bases and weights are kept."""
