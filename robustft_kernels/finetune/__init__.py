"""What is done beside the optimizer: projections, learned radii, interpolation, groups of parameters."""
