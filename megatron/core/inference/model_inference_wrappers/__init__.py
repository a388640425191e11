"""Running a model with a context, under any layout."""
