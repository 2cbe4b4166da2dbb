"""Subspaces in which directions act, and the optimizer state that is kept in their coordinates."""
