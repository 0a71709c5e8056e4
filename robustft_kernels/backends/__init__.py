"""What executes a step: the oracle in plain torch, and the doors to the native and the Triton kernels."""
