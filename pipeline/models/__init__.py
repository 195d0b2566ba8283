"""The models that rows come from: language models of transformers, a tiny one trained here, a synthetic one."""
