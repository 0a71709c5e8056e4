"""A program, run by test_trial.py. It asks for the backend of tensors on a GPU where there is none.

python -m tests.trial_program FOLDER    FOLDER gets a libcuda.so.1 that does nothing but note launches on stderr
python -m tests.trial_program           asks; Triton's own C code talks to that library

What torch.cuda would do is feigned: it starts, and its current device is cuda:0.
"""

import contextlib
import json
import subprocess
import sys
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

LIBRARY = r"""
#include <stdio.h>
#include <stdlib.h>
#define SUCCEEDS(name) int name(void) { return 0; }
#define GIVES(name, type, value) int name(type *out) { *out = value; return 0; }
SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuGetErrorString)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuPointerGetAttribute)
SUCCEEDS(cuStreamIsCapturing)
GIVES(cuDriverGetVersion, int, 13000)
GIVES(cuCtxGetDevice, int, 0)
GIVES(cuDeviceGet, int, 0)
GIVES(cuDeviceGetAttribute, int, 1024)
GIVES(cuFuncGetAttribute, int, 1024)
GIVES(cuCtxGetCurrent, void *, stdout)
GIVES(cuDevicePrimaryCtxRetain, void *, stdout)
GIVES(cuModuleLoadData, void *, stdout)
GIVES(cuModuleGetFunction, void *, stdout)
int cuLaunchKernelEx(unsigned *grid, void *function, void ***values) {
  fprintf(stderr, "launched %u", *grid);
  const char *told = getenv("TOLD");  /* how many of the arguments, which are all addresses */
  for (int i = 0; told && i < atoi(told); ++i) fprintf(stderr, " %ld", (long)*values[i]);
  fprintf(stderr, "\n");
  return 0;
}
"""


def build(folder: Path) -> None:
    """Compiles the library."""
    (folder / "libcuda.c").write_text(LIBRARY)
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *options, folder / "libcuda.c", "-o", folder / "libcuda.so.1"], check=True)


def driver() -> Any:
    """Triton's driver of an sm_90, with its own CudaUtils and CudaLauncher."""
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    from .ptx.device import Driver

    class CudaDriver(Driver):
        launcher_cls = CudaLauncher

        @cached_property
        def utils(self):
            return CudaUtils()

    return CudaDriver()


def main() -> None:
    import torch

    import robustft_kernels as rft
    from robustft_kernels.backends import registry

    torch.cuda.is_available, torch.cuda.init, torch.cuda.current_device = lambda: True, lambda: None, lambda: 0
    torch.cuda.device = lambda index: contextlib.nullcontext()
    with contextlib.suppress(ImportError):
        from triton.runtime import driver as of

        of.set_active(driver())
    found = {"backends": rft.backends()["triton"], "named": ""}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found["auto"] = registry.choose_backend("auto", torch.device("cuda", 0), {torch.float32}).name
    found["warnings"] = [str(of.message) for of in caught]
    try:
        registry.choose_backend("triton", torch.device("cuda", 0), {torch.float32})
    except RuntimeError as error:
        found["named"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:]:
        build(Path(sys.argv[1]))
    else:
        main()
