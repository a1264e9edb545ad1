"""How modules are trained: Lightning's trainer, checkpoints, optimizers, loaders, search."""
