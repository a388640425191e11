"""The log line, trackers and the live progress line."""
