"""Models that read images too."""
