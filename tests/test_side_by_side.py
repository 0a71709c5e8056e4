"""What runs on a GPU takes each backend that is ready there, and says why another is not. Shown without a GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import robustft_kernels as rft
from benchmarks import contenders, machine
from benchmarks.bringup import build, facts, page, smoke, timings
from benchmarks.contest import Field, Stepper
from robustft_kernels.backends import registry

from . import conftest

ROOT = Path(__file__).parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NAMES = ("cuda", "triton", "triton_tickets")
needs_native = pytest.mark.skipif(bool(rft.backends()["native"]), reason=rft.backends()["native"])


@pytest.fixture
def feign(monkeypatch):
    """Makes the backends of a GPU ready for it, but for these: "missing" or "broken"."""

    def make(**states):
        states.setdefault("triton_tickets", states.get("triton"))
        for name in NAMES:
            state = states.get(name)
            feigned = replace(
                registry.BACKENDS[name],
                missing=lambda name=name, state=state: f"no {name}" if state == "missing" else "",
                trial=lambda _, name=name, state=state: f"{name} cannot run" if state == "broken" else "",
                device_type=lambda: "cuda",
                not_chosen=lambda: "",
            )
            monkeypatch.setitem(registry.BACKENDS, name, feigned)

    return make


@pytest.mark.parametrize(
    ("states", "exit_code"),
    [
        ({}, None),
        ({"cuda": "missing"}, None),
        ({"triton": "missing"}, None),
        ({"cuda": "broken"}, None),
        ({"triton": "broken", "cuda": "missing"}, 1),
        ({"triton": "missing", "cuda": "broken"}, 1),
        ({"triton": "missing", "cuda": "missing"}, 0),
    ],
    ids=str,
)
def test_tests_on_a_gpu_need_one_backend(feign, states, exit_code):
    feign(**states)
    if exit_code is None:
        try:
            conftest.need_a_backend()
        except pytest.exit.Exception as ended:  # or it ends this run
            pytest.fail(str(ended))
        return
    words = {"missing": "no {0}", "broken": "{0} cannot run"}
    told = "; ".join(f"{name}: {words[states[name]].format(name)}" for name in NAMES[:2])
    with pytest.raises(pytest.exit.Exception, match=told) as ended:
        conftest.need_a_backend()
    assert ended.value.returncode == exit_code


def test_a_test_of_a_backend_that_is_not_ready_says_why(feign):
    feign(cuda="missing", triton="broken")
    for name, why in (("cuda", "no cuda"), ("triton", "triton cannot run"), ("triton_tickets", "triton_tickets can")):
        with pytest.raises(pytest.skip.Exception, match=f"{name}: {why}"):
            conftest.skip_unless_ready(name, GPU)
    feign()
    for name in NAMES:
        conftest.skip_unless_ready(name, GPU)


@needs_native
def test_projections_are_made_by_the_backend_whose_turn_it_is(monkeypatch):
    made = []
    monkeypatch.setattr(registry, "_warned", {"cpu"})
    for name in ("native", "reference"):
        right = registry.BACKENDS[name]
        prepare = lambda table, right=right: (made.append(right.name), right.prepare(table))[1]  # noqa: E731
        monkeypatch.setitem(registry.BACKENDS, name, replace(right, prepare=prepare))
    params, anchors = [torch.ones(9)], [torch.zeros(9)]
    for name in ("native", "reference", "native"):
        with monkeypatch.context() as turn:
            conftest.take(name, turn)
            made.clear()
            for _ in range(2):
                rft.deviation(params, anchors)
            assert made == [name], "what another has prepared is not taken"


def test_without_triton_only_its_own_tests_are_skipped(tmp_path):
    """Two files of tests import it."""
    (tmp_path / "sitecustomize.py").write_text("""
from importlib.machinery import PathFinder
class WithoutTriton:  # no function, since pytest makes it an attribute of a class
    find = PathFinder.find_spec
    def __call__(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.find(name, path, target)
PathFinder.find_spec = WithoutTriton()
""")
    names = ("triton", "triton_host", "gpu", "gpu_use", "gpu_projection", "gpu_cuda")
    files = [f"tests/test_{name}.py" for name in names]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    for command in (
        ["-m", "pytest", "-p", "no:benchmark", "-rs", "--collect-only", *files],
        ["-c", "import benchmarks.bringup.timings, benchmarks.bringup.smoke, benchmarks.bringup.build"],
    ):
        env = {**alone, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        if "pytest" in command:
            assert "tests/test_gpu.py::test_clipping_is_that_of_torch[cuda]" in done.stdout
            assert "the package triton is not installed" in done.stdout


@pytest.mark.parametrize(
    ("states", "others", "ready"),
    [
        ({}, ["AdamSPD, Triton", "AdamSPD, one launch"], ["cuda", "triton", "triton_tickets"]),
        ({"cuda": "missing"}, ["AdamSPD, CUDA", "AdamSPD, one launch"], ["triton", "triton_tickets"]),
        ({"triton": "broken"}, ["AdamSPD, Triton", "AdamSPD, one launch"], ["cuda"]),
    ],
    ids=str,
)
def test_benchmarks_have_each_backend_once(feign, states, others, ready):
    """ "AdamSPD" is what "auto" takes. What is not ready is among the others, and says why."""
    feign(**states)
    assert machine.chosen(GPU) == ready[0]
    found = contenders.other_forms(GPU)
    assert list(found) == others
    assert contenders.other_forms(CPU) == {}
    absent = {name for name, of in found.items() if of.missing(GPU)}
    assert absent == {contenders.FORMS[name] for name in NAMES if name not in ready}
    assert [name for name, why in machine.serving(GPU).items() if not why] == ready
    assert machine.refusal(GPU) == ""


def test_without_any_backend_nothing_is_measured(feign):
    feign(cuda="missing", triton="broken")
    assert machine.refusal(GPU) == "cuda: no cuda; triton: triton cannot run; triton_tickets: triton_tickets cannot run"


def test_each_backend_is_checked_before_it_is_timed(feign, monkeypatch):
    from benchmarks import conftest as benches

    asked = []
    monkeypatch.setattr(benches, "assert_same_step", lambda *_: None)
    stepper = SimpleNamespace(grads=list, run_oracle=lambda _: None, run=lambda name, _: asked.append(name))
    stepper.clone = lambda: stepper
    monkeypatch.setattr(benches, "Stepper", lambda *_, **__: stepper)
    feign(triton="missing")
    benches.check_results(GPU)
    assert set(asked) == {"cuda"}
    feign()
    benches.check_results(GPU)
    assert set(asked) == set(NAMES)


def test_a_machine_without_triton_is_described(feign, monkeypatch):
    feign(triton="missing")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(machine, "versions_of", lambda names: dict.fromkeys(names, ""))
    told = machine.describe(GPU)
    assert (told["device"], told["backend"], told["triton"]) == ("a GPU", "cuda", "")


def test_smoke_steps_by_each_backend(feign):
    feign(cuda="missing")
    found = smoke.items(GPU)
    assert found.pop("cuda, all methods")() == {"outcome": "skipped", "why": "no cuda"}
    assert {name.rpartition(", ")[2] for name in found} == {"triton", "triton_tickets"}
    feign(triton="broken")  # it is there, so each of its steps fails
    found = smoke.items(GPU)
    counts = [sum(name.endswith(f", {form}") for name in found) for form in NAMES]
    assert counts == [len(found) // 3] * 3
    assert smoke.items(CPU)["triton, all methods"]() == {"outcome": "skipped", "why": "it serves cuda tensors"}


@needs_native
def test_timings_of_the_cuda_backend(monkeypatch):
    """The native backend takes its place. Steps in which nothing fires move fewer bytes."""
    on_cpu = {name: of for name, of in timings.contenders(torch.float32, {}).items() if not of.backend}
    feigned = {**on_cpu, timings.CUDA: contenders.ours("spd", "native")}
    monkeypatch.setattr(timings, "contenders", lambda *_: feigned)
    told = timings.measure([], torch.float32, {}, CPU)
    assert told.get("outcome") is None, told
    none, some = (told["sweeps"][name] for name in (timings.NONE_FIRES, timings.SOME_FIRE))
    assert none["fired"] == 0 < some["fired"] == told["fired"]
    assert some["bytes"] == pytest.approx(told["contenders"][timings.CUDA]["bytes"], rel=1e-4)
    assert some["bytes"] > none["bytes"] > 0
    assert some["seconds"][1] == told["contenders"][timings.CUDA]["device"]
    text = page.page_of(record(timings={"it": {"outcome": "ok", **told}}))
    assert f"| it | {timings.NONE_FIRES} | 0% |" in text
    assert "| host time: µs until the call returns | torch fused |" in text


@needs_native
def test_a_pass_that_fires_all_the_same_is_an_error_and_the_gradients_come_back(monkeypatch):
    on = Field([(50, 400)] * 10, torch.float32, CPU, 0.5)
    stepper = Stepper(contenders.METHODS["AdamSPD"], on)
    stepper.prepare(), stepper.step(), on.turn()
    before = [grad.clone() for grad in on.grads]
    monkeypatch.setattr(Field, "let_fire", lambda self, firing, of=Field.let_fire: of(self, True))
    with pytest.raises(RuntimeError, match="fired in steps in which nothing should"):
        timings.none_fires(stepper, on, timings.Clock(CPU), 0.0, 2)
    monkeypatch.undo()
    timings.none_fires(stepper, on, timings.Clock(CPU), 0.0, 2)
    assert all(map(torch.equal, before, on.grads))


def record(**stages):
    told = {
        name: dict(outcome="ok", seconds=1.0, counts={"ok": 1}, items=items, problems={}, tail="")
        for name, items in stages.items()
    }
    return {"device": "cuda", "minutes": 9.0, "began": "now", "stages": told}


@pytest.mark.parametrize(
    ("missing", "cuda", "nvcc", "file", "outcome"),
    [
        ("", "", True, True, {"did": "loaded them on the GPU"}),
        ("", "", False, True, {"did": "loaded them on the GPU"}),  # carried here
        ("not compiled", "not compiled", False, False, {"outcome": "skipped", "why": "not compiled"}),
        ("not compiled", "not compiled", True, False, "though there is nvcc: not compiled"),
        ("", "compiled from other sources", False, True, "compiled from other sources"),
        ("no GPU", "no GPU", True, True, {"outcome": "skipped", "why": "no GPU"}),
    ],
)
def test_a_build_tells_of_the_kernels(monkeypatch, tmp_path, missing, cuda, nvcc, file, outcome):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(build, "ready", lambda: (missing, {"cuda": cuda}))
    monkeypatch.setattr(build, "has_nvcc", lambda: nvcc)
    if file:
        (tmp_path / build.KERNELS).touch()
    if isinstance(outcome, dict):
        assert build.kernels() == outcome
        return
    with pytest.raises(RuntimeError, match=outcome):
        build.kernels()


def test_kernels_that_are_not_there_are_built_where_nvcc_is(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (tmp_path / f"_native{build.EXTENSION_SUFFIXES[0]}").touch()
    for nvcc, file, fresh in ((False, False, True), (True, False, False), (True, True, True)):
        monkeypatch.setattr(build, "has_nvcc", lambda nvcc=nvcc: nvcc)
        if file:
            (tmp_path / build.KERNELS).touch()
        assert build.fresh() == fresh
    os.utime(tmp_path / build.KERNELS, (0, 0))
    assert not build.fresh(), "they are older than their sources"


@pytest.mark.parametrize("home", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_is_found_where_setup_py_finds_it(monkeypatch, tmp_path, home):
    (tmp_path / "bin").mkdir()
    for name in ("nvcc", "of_this_test"):
        (tmp_path / "bin" / name).touch(mode=0o755)
    monkeypatch.setattr(facts, "TOOLS", ("nvcc", "of_this_test", "nowhere"))
    monkeypatch.setenv(home, str(tmp_path))
    assert facts.tools() == {"nvcc": True, "of_this_test": True, "nowhere": False}
    assert build.has_nvcc()
    monkeypatch.setenv("ROBUSTFT_CUDA", "0")
    assert not build.has_nvcc()


def test_the_page_tells_of_backends():
    told = facts.told({"cuda": "no nvcc", "triton": ""})
    of = {"outcome": "ok", "facts": told}
    text = page.page_of(record(facts={"before": of}, build={"after": of, "it": {"outcome": "ok", "did": "so"}}))
    assert "- before: cuda is not ready (no nvcc), triton is ready\n- after: cuda is not ready (no nvcc)" in text
    assert "- it:" not in text
