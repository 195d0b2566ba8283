"""Imported once by the parent of all processes that extract or train, which then have what they need from the start.

It must not start a thread: the processes are forks of it.
"""

from importlib import import_module

from pipeline.texts import python

for module in ("pipeline.extract.extraction", "pipeline.train.training", "transformers.models.gemma2.modeling_gemma2"):
    import_module(module)
python.fingerprint()
list(python.corpus_texts())
