"""The command `robustft`: checkpoints compared, interpolated and projected, and what this machine can do."""
