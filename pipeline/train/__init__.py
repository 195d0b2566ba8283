"""Stage 2: every arm of the study, in lockstep, from one pass over the store."""
