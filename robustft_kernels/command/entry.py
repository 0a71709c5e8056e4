"""Where the command begins. The package itself needs none of the libraries that the command needs."""

import sys
from collections.abc import Sequence

NEEDED = ("click", "tqdm", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 if it could not be done, 2 if it was not understood.

    arguments: those after the program's name. None takes them from sys.argv.
    """
    try:
        from .cli import run
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(f"robustft: {error.name} is not installed; pip install robustft_kernels[cli]", file=sys.stderr)
        return 1
    return run(sys.argv[1:] if arguments is None else arguments)
