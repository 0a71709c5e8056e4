"""Installation: the torch that a build finds, the record of what it was built for, and one command that mends."""

import importlib
import json
import os
import site
import subprocess
import sys
import sysconfig
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from robustft_kernels.backends import built, native

ROOT = Path(__file__).parents[1]
MINOR = ".".join(torch.__version__.split("+")[0].split(".")[:2])
OTHER = os.environ.get("ROBUSTFT_OTHER_PYTHON", "")


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


PIP = "pip install --force-reinstall --no-deps --no-cache-dir"
UV = "uv pip install --reinstall --no-deps --no-cache --no-build-isolation"


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ({"url": "file:///home/me/src", "dir_info": {}}, "/home/me/src"),
        ({"url": "file:///home/my%20own/src", "dir_info": {}}, "'/home/my own/src'"),
        ({"url": "file:///home/me/src", "dir_info": {"editable": True}}, "-e /home/me/src"),
        ({"url": "https://x/y.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "'git+https://x/y.git@abc'"),
        ({"url": "https://x/y.tar.gz", "archive_info": {}}, "https://x/y.tar.gz"),
        ({"url": "file:///home/me/robustft.whl", "archive_info": {}}, ". # in a clone of its sources"),
        ({}, ". # in a clone of its sources"),
    ],
)
@pytest.mark.parametrize(("installer", "start"), [("pip\n", PIP), ("uv", UV), (None, PIP)])
def test_the_command_names_where_the_package_came_from(monkeypatch, tmp_path, url, source, installer, start):
    monkeypatch.setattr(built, "RECORD", tmp_path / "robustft_kernels" / "_built.json")
    files = {"INSTALLER": installer, "direct_url.json": json.dumps(url) if url else None}
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=files.get))
    assert built.command() == f"{start} {source}"


def test_a_checkout_that_is_not_installed_is_named(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    assert built.command().endswith(f" -e {ROOT}")


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    try:
        return importlib.import_module("build_backend")
    except SystemExit as why:  # as without isolation
        pytest.skip(str(why))


def test_a_build_sees_the_torch_of_its_interpreter(hooks, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # whatever the tests run in
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: str(tmp_path))
    asked = lambda: hooks._required(lambda _: ["setuptools"])()  # noqa: E731
    assert asked() == ["setuptools", "torch>=2.10"]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    assert asked() == ["setuptools"]
    seen = hooks._building(lambda: list(sys.path))()
    assert seen[-1] == str(tmp_path)
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize("seen", [True, False])
def test_a_build_sees_the_torch_of_the_system_where_its_environment_does(hooks, monkeypatch, tmp_path, seen):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: str(tmp_path))
    monkeypatch.setattr(site, "getsitepackages", lambda prefixes: [f"{prefix}/packages" for prefix in prefixes])
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "system"))
    torch_there = tmp_path / "system" / "packages" / "torch"
    torch_there.mkdir(parents=True)
    (torch_there / "__init__.py").touch()
    (tmp_path / "pyvenv.cfg").write_text(f"home = /x\ninclude-system-site-packages = {str(seen).lower()}\n")
    assert hooks.packages() == [str(torch_there.parent)] * seen


@pytest.mark.parametrize("old", [True, False])
def test_without_a_setuptools_that_builds_wheels_one_line_says_so(tmp_path, old):
    """Without isolation that of the environment builds. Before 70.1 it needed `wheel`."""
    if old:
        (tmp_path / "setuptools" / "command").mkdir(parents=True)
        for folder in ("setuptools", "setuptools/command"):
            (tmp_path / folder / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import build_backend"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == ('robustft_kernels: no setuptools here can build a wheel; install "setuptools>=75" first\n')


def like(python, folder):
    """An environment with what that of this interpreter has, but for this package and what builds it."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    here = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    there = next(folder.glob("lib/python*/site-packages"))
    for path in Path(here).iterdir():
        builds = path.name.startswith(("pip", "setuptools", "wheel", "_distutils", "distutils"))
        if not builds and "robustft" not in path.name and not (there / path.name).exists():
            (there / path.name).symlink_to(path)
    return folder / "bin" / "python", there / "robustft_kernels"


@pytest.fixture
def source(tmp_path):
    """A copy of the sources in which another torch's extension seems up to date."""
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    folder = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "robustft_kernels"
    folder.mkdir(parents=True)
    (folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("another torch's")
    return source


@pytest.fixture
def environment(tmp_path):
    """That of a user who has no ninja."""
    ninja = tmp_path / "bin" / "ninja"
    ninja.parent.mkdir()
    ninja.write_text("#!/bin/sh\nexit 1\n")
    ninja.chmod(0o755)
    told = {**os.environ, "ROBUSTFT_CUDA": "0", "PATH": f"{ninja.parent}{os.pathsep}{os.environ['PATH']}"}
    told.pop("PYTHONPATH", None)
    return told


def step(python, environment, folder):
    """What backends() says after a step, and what was warned of."""
    code = (
        "import torch, robustft_kernels as r; p = torch.nn.Parameter(torch.ones(9)); p.grad = torch.ones(9); "
        "r.AdamSPD([p]).step(); print(r.backends())"
    )
    done = subprocess.run(
        [python, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return eval(done.stdout), done.stderr


@pytest.mark.full
@pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING or "ready")
def test_plain_pip_install_gives_the_native_backend(tmp_path, source, environment):
    """With build isolation. Then the same under another torch, as the record tells: a warning, and no crash."""
    python, package = like(sys.executable, tmp_path / "venv")
    subprocess.run([python, "-m", "pip", "install", "--no-deps", str(source)], env=environment, check=True, timeout=900)
    told, _ = step(python, environment, tmp_path)
    assert told["native"] == ""
    assert "there was no nvcc, or ROBUSTFT_CUDA=0; mend that, and then: pip install" in told["cuda"]
    (package / "_built.json").write_text(json.dumps({"torch": "1.13.1"}))
    told, warned = step(python, environment, tmp_path)
    assert f"built for torch 1.13, and this is torch {MINOR}" in warned
    assert f"{PIP} {source}\n" in warned
    assert "built for torch 1.13" in told["native"]


def torch_of(python):
    """The minor versions of its Python and of its torch."""
    code = (
        "import sys, torch; print('.'.join(map(str, sys.version_info[:2])), '.'.join(torch.__version__.split('.')[:2]))"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.full
@pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING or "ready")
@pytest.mark.skipif(not OTHER, reason="ROBUSTFT_OTHER_PYTHON names no interpreter with another torch")
def test_another_torch_refuses_the_wheel_of_this_one_and_the_command_mends_it(tmp_path, source, environment):
    its_python, its_torch = torch_of(OTHER)
    if its_python != torch_of(sys.executable)[0] or its_torch == MINOR:
        pytest.skip(f"it has Python {its_python} and torch {its_torch}: it must be this Python, and another torch")
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, source], env=environment, check=True, timeout=900)
    python, package = like(OTHER, tmp_path / "venv")
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "--no-deps", wheel], env=environment, check=True, timeout=300)
    told, warned = step(python, environment, tmp_path)
    objection, command = told["native"].split("; build it anew: ")
    assert objection == f"the C++ extension was built for torch {MINOR}, and this is torch {its_torch}"
    assert f"the slow reference backend serves the CPU: {told['native']}\n" in warned
    there = {**environment, "PATH": f"{python.parent}{os.pathsep}{environment['PATH']}"}
    subprocess.run(command, shell=True, cwd=source, env=there, check=True, timeout=900)
    told, warned = step(python, environment, tmp_path)
    assert told["native"] == ""
    assert not warned
    assert json.loads((package / "_built.json").read_text())["torch"].startswith(its_torch)
