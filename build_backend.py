"""setuptools as a build backend that finds torch.

pip builds in an environment of its own, where there is no torch. But the extension must be built against the torch that
it will run under. pip builds with the interpreter that it installs for, so torch is found where that keeps its
packages. If there is none, as under uv, the newest is asked for.
"""

import site
import sys
import sysconfig
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

# Without isolation there may be no setuptools, or one that needs `wheel` (before 70.1).
if find_spec("setuptools") is None or not any(map(find_spec, ("setuptools.command.bdist_wheel", "wheel"))):
    sys.exit('robustft_kernels: no setuptools here can build a wheel; install "setuptools>=75" first')

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that are not replaced

TORCH = "torch>=2.10"


def packages():
    """The folders of packages of the interpreter that have a torch."""
    places = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    settings = Path(sys.prefix, "pyvenv.cfg")
    if settings.exists() and "include-system-site-packages = true" in settings.read_text():
        places += site.getsitepackages([sys.base_prefix])
    return [place for place in dict.fromkeys(places) if (Path(place) / "torch" / "__init__.py").exists()]


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
