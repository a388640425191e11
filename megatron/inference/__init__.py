"""Serving of trained models, on top of the library and the training application."""
