"""Reads corpora and labelled texts from files, from the Python installation and from the Hugging Face Hub."""
