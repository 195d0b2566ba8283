"""Where text comes from: corpora and labelled texts, in files, in the Python installation, or on the Hugging Face Hub."""
