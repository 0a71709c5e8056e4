"""From parameter groups to the calls of backends: plans, launches, and the two halves of a step over processes."""
