"""Stores and identifies artefacts: storage, keys, manifests, the workspace."""
