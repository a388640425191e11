"""Training of retrieval, and the index of what is retrieved."""
