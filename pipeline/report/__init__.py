"""Shows a study: one page, and the same numbers as data."""
