"""What a step works on: methods, bases, state, anchors, and which part of a tensor is here. Nothing here makes a
step."""
