"""What a step is about: methods, bases, state, anchors, and which part of a tensor is here. Nothing here steps."""
