"""Stage 3: evaluates finished SAEs, by the table in `pipeline.study.evaluations`."""
