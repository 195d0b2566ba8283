"""Imported once by the parent of all extraction processes, which then have what they need from the start.

It must not start a thread: the processes are forks of it.
"""

import transformers.models.gemma2.modeling_gemma2

import pipeline.extract.model
import pipeline.extract.stage  # noqa: F401
from pipeline.extract import python_text

python_text.fingerprint()
list(python_text.corpus_texts())
