"""The Triton sweeps, installed as `robustft_kernels.triton_kernels`."""
