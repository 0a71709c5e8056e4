"""The command `robustft`: checkpoints compared, interpolated, projected and averaged, and what this machine can do."""
