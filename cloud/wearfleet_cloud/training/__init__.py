"""Training: loop, optimisers, selection, metrics, checkpoints."""
