"""Subspaces in which directions act: coordinates of a tensor and their integer-exact lift."""
