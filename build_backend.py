"""setuptools as a build backend that finds torch.

pip builds in an environment of its own, where there is no torch. But the extension must be built against the torch that
it will run under. pip builds with the interpreter that it installs for, so torch is found where that keeps its
packages. If there is none, as under uv, the newest is asked for.
"""

import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that are not replaced

TORCH = "torch>=2.10"


def packages():
    """The folders of packages of the interpreter that have a torch."""
    places = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    return [place for place in places if (Path(place) / "torch" / "__init__.py").exists()]


@contextmanager
def torch_in_sight():
    """Those folders come last, so that all else is the build's own."""
    before = sys.path[:]
    sys.path += [place for place in packages() if place not in sys.path]
    try:
        yield
    finally:
        sys.path[:] = before


def _required(hook):
    def requires(config_settings=None):
        return hook(config_settings) + ([] if packages() else [TORCH])

    return requires


def _building(hook):
    def build(*args, **options):
        with torch_in_sight():
            return hook(*args, **options)

    return build


get_requires_for_build_wheel = _required(build_meta.get_requires_for_build_wheel)
get_requires_for_build_editable = _required(build_meta.get_requires_for_build_editable)
build_wheel = _building(build_meta.build_wheel)
build_editable = _building(build_meta.build_editable)
