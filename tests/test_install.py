"""Installation: the torch that a build finds, the record of what it was built for, and one command that mends."""

import importlib
import json
import os
import subprocess
import sys
import sysconfig
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch

from robustft_kernels.backends import built, native

ROOT = Path(__file__).parents[1]
MINOR = ".".join(torch.__version__.split("+")[0].split(".")[:2])


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Puts another record in the place of the one that setup.py has written."""

    def record(**told):
        path = tmp_path / "robustft_kernels" / "_built.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(told))
        monkeypatch.setattr(built, "RECORD", path)
        built.record.cache_clear()

    yield record
    built.record.cache_clear()


def test_the_extension_is_for_one_minor_version_of_torch(recorded):
    for version in (torch.__version__, f"{MINOR}.9+cu130"):
        recorded(torch=version)
        assert not built.objection()
    recorded(torch="1.13.1")
    assert built.objection().startswith(
        f"the C++ extension was built for torch 1.13, and this is torch {MINOR}; build it anew: pip install --force"
    )
    with pytest.warns(RuntimeWarning, match=r"slow reference backend serves the CPU: .* built for torch 1\.13"):
        built.warn_if_unusable()


def test_a_failed_build_is_told_with_its_reason(recorded):
    recorded(torch=torch.__version__, native="CompileError: no g++", cuda="there was no nvcc")
    assert "not built (CompileError: no g++; mend that, and then: pip install" in built.objection()
    assert built.failure("cuda").startswith("there was no nvcc; mend that, and then: pip install")
    recorded(torch=torch.__version__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built.warn_if_unusable()


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ({"url": "file:///home/me/src", "dir_info": {}}, "/home/me/src"),
        ({"url": "file:///home/me/src", "dir_info": {"editable": True}}, "-e /home/me/src"),
        ({"url": "https://x/y.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "'git+https://x/y.git@abc'"),
        ({}, "robustft_kernels"),
    ],
)
def test_the_command_names_where_the_package_came_from(monkeypatch, url, source):
    class Distribution:
        def read_text(self, name):
            assert name == "direct_url.json"
            return json.dumps(url)

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())
    assert built.command() == f"pip install --force-reinstall --no-deps --no-cache-dir {source}"


def test_a_checkout_that_is_not_installed_is_named(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    assert built.command().endswith(f" -e {ROOT}")


def test_a_build_sees_the_torch_of_its_interpreter(monkeypatch, tmp_path):
    sys.path.insert(0, str(ROOT))
    try:
        backend = importlib.import_module("build_backend")
    finally:
        sys.path.remove(str(ROOT))
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: str(tmp_path))
    asked = lambda: backend._required(lambda _: ["setuptools"])()  # noqa: E731
    assert asked() == ["setuptools", "torch>=2.10"]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    assert asked() == ["setuptools"]
    seen = backend._building(lambda: list(sys.path))()
    assert seen[-1] == str(tmp_path)
    assert str(tmp_path) not in sys.path


def like_this_one(folder):
    """An environment with what this one has, but for this package and what builds it."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    here = Path(sysconfig.get_path("purelib"))
    there = next(folder.glob("lib/python*/site-packages"))
    for path in here.iterdir():
        builds = path.name.startswith(("pip", "setuptools", "wheel", "_distutils", "distutils"))
        if not builds and "robustft" not in path.name and not (there / path.name).exists():
            (there / path.name).symlink_to(path)
    return folder / "bin" / "python", there / "robustft_kernels"


@pytest.mark.full
@pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING or "ready")
def test_plain_pip_install_gives_the_native_backend(tmp_path):
    """With build isolation. Then the same under another torch, as the record tells: a warning, and no crash."""
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    python, package = like_this_one(tmp_path / "venv")
    environment = {**os.environ, "ROBUSTFT_CUDA": "0"}
    environment.pop("PYTHONPATH", None)
    subprocess.run([python, "-m", "pip", "install", "--no-deps", str(source)], env=environment, check=True, timeout=900)
    step = (
        "import torch, robustft_kernels as r; p = torch.nn.Parameter(torch.ones(9)); p.grad = torch.ones(9); "
        "r.AdamSPD([p]).step(); print(r.backends())"
    )

    def run():
        return subprocess.run(
            [python, "-c", step], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    told = eval(done.stdout)
    assert told["native"] == ""
    assert "there was no nvcc, or ROBUSTFT_CUDA=0; mend that, and then: pip install" in told["cuda"]
    (package / "_built.json").write_text(json.dumps({"torch": "2.10.0"}))
    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"built for torch 2.10, and this is torch {MINOR}" in done.stderr
    assert f"pip install --force-reinstall --no-deps --no-cache-dir {source}" in done.stderr
    assert "built for torch 2.10" in eval(done.stdout)["native"]
