"""Module paths that the import system does not find by itself.

- The modules of 0.3.0 under their old names, with a DeprecationWarning. They go in 0.5.0.
- `robustft_kernels.triton_kernels` in a checkout. There that folder lies beside this package and not within it.
"""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
KERNELS = Path(__file__).parents[1] / "triton_kernels"
_FOLDERS = {
    "core": ("anchors", "bases", "methods", "sharding", "state"),
    "step": ("decide", "launch", "ops", "plan"),
    "backends": ("reference",),
    "optim": ("anchored", "around", "in_backward", "named", "optimizers", "wrapper"),
    "finetune": ("evaluation", "param_groups", "prefixes", "projection", "slopes", "tpgm", "wise"),
    "testing": ("cases",),
}
MOVED = {name: f"{folder}.{name}" for folder, names in _FOLDERS.items() for name in names} | {"spread": "step.sharded"}


class Finder(MetaPathFinder):
    """Finds a module that no other finder knows, as the last one to be asked."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        if parent != PACKAGE:
            return None
        if name == "triton_kernels" and KERNELS.is_dir():
            return spec_from_file_location(fullname, KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)])
        if name not in MOVED:
            return None
        new = f"{PACKAGE}.{MOVED[name]}"
        warnings.warn(f"{fullname} is now {new}; the old name goes in 0.5.0", DeprecationWarning, stacklevel=2)
        return ModuleSpec(fullname, _Alias(new))


class _Alias(Loader):
    """Loads a module that is imported under another name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has replaced it by that of the old name


def install() -> None:
    """Adds the finder to the import system, once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
