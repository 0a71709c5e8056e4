"""Runs the command, and prints its exit code, its seconds, and the bytes of peak memory before it and after.

The peak is VmHWM, that of this program alone. What getrusage tells, ru_maxrss, begins at that of the parent process.
"""

import re
import sys
import time
from pathlib import Path

import torch

from robustft_kernels.command.cli import run


def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


torch.zeros(1).square_()  # what torch sets up at its first use is not the command's
before, start = peak(), time.perf_counter()
code = run(sys.argv[1:])
print()
print(code, time.perf_counter() - start, before, peak())
