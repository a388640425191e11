"""Token files, the samples cut out of them, and blends of several."""
