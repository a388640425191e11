"""Questions whose answers are to be found in passages."""
