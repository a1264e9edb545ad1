"""What runs: stages, the graph of their folders, manifests, and a stage at work."""
