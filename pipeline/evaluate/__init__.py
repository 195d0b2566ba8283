"""Stage 3: evaluate finished SAEs, by the table in `pipeline.study.evaluations`."""
