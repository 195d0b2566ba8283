"""Reads an experiment and its arms, and plans the artefacts that the study needs."""
