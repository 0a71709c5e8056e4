"""The first run on a GPU: is a step right there, and how fast is it? It needs nothing but torch, Triton and pytest.

python -m benchmarks.bringup        (make bringup)
"""
