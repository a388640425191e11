"""Preparing data for training and feeding it to the training loop."""
