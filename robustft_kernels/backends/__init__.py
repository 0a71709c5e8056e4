"""What executes a step: the reference in plain torch, and the doors to the native and the Triton kernels."""
