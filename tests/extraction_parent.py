"""Imported once by the parent of all extraction processes, which then have what they need from the start.

It must not start a thread: the processes are forks of it.
"""

from importlib import import_module

from pipeline.extract import python_text

for module in ("pipeline.extract.stage", "transformers.models.gemma2.modeling_gemma2"):
    import_module(module)
python_text.fingerprint()
list(python_text.corpus_texts())
