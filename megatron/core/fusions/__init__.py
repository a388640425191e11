"""Element-wise and reduction kernels that save memory traffic over the composed torch operations."""
