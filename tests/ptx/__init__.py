"""Runs the compiled GPU kernels on a CPU: the PTX that a GPU's driver would get, thread by thread.

It takes the PTX of Triton, and that of nvcc. Triton's interpreter shows that the source is right. This shows what the
compiler made of it: which thread reads and writes what, and when. It finds races, barriers that are missing, accesses
that are misaligned or out of bounds, waits without an end, and results that depend on the order in which threads come.

- module.py, translate.py: PTX to C++, for a kernel and the functions that it calls.
- instructions.py, arithmetic.py, memory.py: a function for each kind of instruction. operands.py: what it works on.
- machine.h: the threads, their order and memory. races.h: who knows of whose accesses. arithmetic.h: the numbers.
- program.py: a kernel, compiled by the C++ compiler and called.
- samples.py: small programs that show that all this is right.
- device.py: the machine in the place of a GPU. The Triton backends then make their steps on it.
- steps.py: the steps that are compared with the oracle. harmless.py: races that do no harm, and why.
- faults.py: small faults in the PTX, which the checks must see.
- __main__.py: the checks (make test-ptx).

Not known: local memory (arrays on a thread's stack), constants of a module, indirect calls and branches. A kernel that
has them is refused.

It does not show speed, nor what ptxas makes of the PTX. Memory is sequentially consistent: a wrong memory order shows
as a race alone. Approximate instructions are off from the exact result by up to what the manual allows.
"""
