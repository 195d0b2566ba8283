"""Imported once by the parent of all extraction processes, which then have what they need from the start.

It must not start a thread: the processes are forks of it.
"""

from importlib import import_module

from pipeline.texts import python

for module in ("pipeline.extract.extraction", "transformers.models.gemma2.modeling_gemma2"):
    import_module(module)
python.fingerprint()
list(python.corpus_texts())
