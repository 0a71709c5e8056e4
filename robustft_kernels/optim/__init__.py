"""The optimizers, and the wrapper around the optimizers of others."""
