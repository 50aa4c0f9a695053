"""Keys, manifests and the artifact store. Shared with the runtimes; imports nothing heavy, and nothing of ours."""
