"""Where bytes live: storage, identity, manifests, the workspace."""
