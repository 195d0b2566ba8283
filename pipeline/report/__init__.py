"""The comparison as one page, and as data beside it."""
