"""Runs the command on a pair of checkpoints, and prints its exit code, seconds and peak memory. `python
command_program.py ARGUMENTS`."""

import resource
import sys
import time

import torch

from robustft_kernels.command.cli import run

torch.zeros(1).square_()  # what torch sets up at its first use is not the command's
start = time.perf_counter()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = run(sys.argv[1:])
print()
print(code, time.perf_counter() - start, before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
