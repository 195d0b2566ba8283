"""sae-bench's other evaluations, by its own functions."""
