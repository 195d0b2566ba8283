"""Stage 3: sparse probing, pair capture and reconstruction of finished SAEs."""
