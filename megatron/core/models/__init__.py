"""Whole models, assembled from the building blocks by specs."""
