"""The first run on a GPU: is a step right there, and how fast is it? It needs nothing but torch, pytest, and
Triton or nvcc.

python -m benchmarks.bringup        (make bringup)
"""
