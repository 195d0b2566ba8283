"""Stage 2: trains every arm of the study in lockstep, from one pass over the store."""
