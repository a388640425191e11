"""Measure what a layout computes, and compare it with one process in float64."""
