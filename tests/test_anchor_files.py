"""Anchors in safetensors files: read into memory, or left on disk."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.core.files import INDEX
from tests.test_anchors import NAMES
from tests.test_optimizers import make, run
from tests.test_state import copies, saved_and_loaded


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.torch")


def write(safetensors, path, params, files=1):
    """A checkpoint as Hugging Face writes it, in one file or several."""
    tensors = {name: p.detach().clone() for name, p in zip(NAMES, params, strict=False)}
    if files == 1:
        safetensors.save_file(tensors, path / "model.safetensors")
        return
    places = {name: f"model-{i % files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        safetensors.save_file({n: t for n, t in tensors.items() if places[n] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("files", [1, 2])
def test_anchors_in_a_file(backend, safetensors, tmp_path, files):
    """Steps are the same as with anchors that are given, wherever the file's are."""
    pretrained = make()
    write(safetensors, tmp_path, pretrained, files)
    path = str(tmp_path / ("model.safetensors" if files == 1 else INDEX))
    results = []
    for anchor, device in ((tmp_path, None), (path, "disk"), ([p.detach() for p in pretrained], None)):
        params = copies(make())
        named = list(zip(NAMES, params, strict=False))
        optimizer = rft.AdamSPD(named, lr=1e-2, anchor=anchor, anchor_device=device, backend=backend)
        run(optimizer, params, 3)
        results.append(params)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_a_checkpoint_knows_the_file_by_its_hash(backend, safetensors, tmp_path):
    write(safetensors, tmp_path, make())

    def fresh(params, anchor=tmp_path):
        return rft.AdamSPD(zip(NAMES, params, strict=False), lr=1e-2, anchor=anchor, backend=backend)

    params = copies(make())
    optimizer = fresh(params)
    run(optimizer, params, 2)
    checkpoint = saved_and_loaded(optimizer.state_dict())
    assert all("anchor" not in of and of["anchor_digest"].shape == (32,) for of in checkpoint["state"].values())
    resumed = copies(params)
    other = fresh(resumed)
    other.load_state_dict(checkpoint)
    assert other.param_groups[0]["anchor"] == "file"
    run(optimizer, params, 2, start=2)
    run(other, resumed, 2, start=2)
    assert all(map(torch.equal, params, resumed))

    changed = copies(make())
    with torch.no_grad():
        changed[2][0, 0] += 1e-6
    (elsewhere := tmp_path / "other").mkdir()
    write(safetensors, elsewhere, changed)
    for anchor, message in ((elsewhere, "the anchor of parameter 'w2' is not the one"), ("zero", "'w0' to a file")):
        refusing = fresh(copies(make()), anchor)
        with pytest.raises(ValueError, match=message):
            refusing.load_state_dict(checkpoint)
        assert not any("exp_avg" in of for of in refusing.state.values())


def test_files_that_do_not_serve(safetensors, tmp_path):
    params = make()
    named = list(zip(NAMES, params, strict=False))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        rft.AdamSPD(named, anchor=tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"read from \.safetensors files.*not 'weights.bin'"):
        rft.AdamSPD(named, anchor=tmp_path / "weights.bin")
    write(safetensors, tmp_path, params[:-1])
    with pytest.raises(ValueError, match=f"the anchor mapping lacks '{NAMES[len(params) - 1]}'"):
        rft.AdamSPD(named, anchor=tmp_path)
    write(safetensors, tmp_path, [p.flatten() for p in params])
    with pytest.raises(ValueError, match="the anchor of parameter 'w0' has shape"):
        rft.AdamSPD(named, anchor=tmp_path)
    with pytest.raises(ValueError, match="an anchor mapping needs named parameters"):
        rft.AdamSPD(params, anchor=tmp_path)
    head = nn.Parameter(torch.zeros(3))  # a head that the file does not have needs no anchor
    write(safetensors, tmp_path, params)
    groups = [{"params": named}, {"params": [("head", head)], "method": "none"}]
    assert "anchor" not in rft.AdamSPD(groups, anchor=tmp_path).state[head]


def rewrite(path, how):
    """Changes a file in place, or its directory."""
    if how == "renamed over":
        shutil.copy(path, aside := path.with_suffix(".new"))
        aside.replace(path)
    elif how == "deleted":
        path.unlink()
    else:
        content = bytes(path.stat().st_size // (1 if how == "of the same length" else 1000))
        was = path.stat().st_mtime_ns
        with path.open("r+b") as file:
            file.write(content)
            file.truncate()
        os.utime(path, ns=(was + 10**9, was + 10**9))  # clocks of file systems tick in milliseconds


HARMLESS, HARMFUL = ("renamed over", "deleted"), ("of the same length", "shorter")
OPTIMIZERS = {
    "AdamSPD": (rft.AdamSPD, dict(lr=1e-2)),
    "SGDFTP": (rft.SGDFTP, dict(lr=1e-2, momentum=0.9)),
    "Anchored": (lambda params, **own: rft.Anchored(torch.optim.SGD(params, lr=1e-2), **own), {}),
}


@pytest.mark.parametrize("how", [*HARMLESS, *HARMFUL])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_read_stays_whatever_becomes_of_the_file(safetensors, tmp_path, how, kind):
    cls, own = OPTIMIZERS[kind]
    start = make()
    write(safetensors, tmp_path, start)
    results = []
    for anchor in ([p.detach() for p in copies(start)], tmp_path):
        params = copies(p * 1.5 for p in make())
        optimizer = cls(zip(NAMES, params, strict=False), anchor=anchor, **own)
        if anchor is tmp_path:
            rewrite(tmp_path / "model.safetensors", how)
        run(optimizer, params, 3)
        optimizer.telemetry()
        optimizer.state_dict()
        results.append(params)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("how", [*HARMLESS, *HARMFUL])
def test_tpgm_reads_its_file_once(safetensors, tmp_path, how):
    model = nn.Sequential(nn.Linear(40, 40))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    safetensors.save_file(start, tmp_path / "model.safetensors")
    tpgm = rft.TPGM(model, anchor=tmp_path, init=1e-8)
    rewrite(tmp_path / "model.safetensors", how)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    tpgm.project_()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), start[name], atol=1e-6, rtol=0)


def on_disk(folder, cls=rft.AdamSPD, **own):
    """An optimizer with its anchors on disk after a step, its parameters and its file."""
    params = copies(p * 1.5 for p in make())
    optimizer = cls(zip(NAMES, params, strict=False), lr=1e-2, anchor=folder, anchor_device="disk", **own)
    run(optimizer, params, 1)
    return optimizer, params, folder / "model.safetensors"


@pytest.mark.parametrize("how", HARMFUL)
def test_a_step_refuses_anchors_whose_file_was_written(safetensors, tmp_path, backend, how):
    """Nothing is changed by it. The optimizer can be saved, and goes on with new anchors."""
    write(safetensors, tmp_path, make())
    kept = rft.AdamSPD(zip(NAMES, make(), strict=False)).state_dict()
    for planned in (True, False):
        optimizer, params, file = on_disk(tmp_path, backend=backend)
        saved = optimizer.state_dict()
        before = copy.deepcopy([[p.detach(), optimizer.state[p]["exp_avg"]] for p in params])
        rewrite(file, how)
        if not planned:
            optimizer._plans.clear()
        message = "model.safetensors' was written after anchors were mapped"
        for what in (
            lambda o=optimizer, of=params: run(o, of, 1),
            optimizer.telemetry,
            lambda o=optimizer: copy.deepcopy(o),
            lambda o=optimizer: on_disk_again(o),
        ):
            with pytest.raises(RuntimeError, match=message):
                what()
        for p, (weights, moment) in zip(params, before, strict=True):
            assert torch.equal(p, weights)
            assert torch.equal(optimizer.state[p]["exp_avg"], moment)
        assert saved_and_loaded(optimizer.state_dict())["state"].keys() == saved["state"].keys()
        if planned:
            optimizer.reanchor()
        else:
            optimizer.load_state_dict(kept)
        run(optimizer, params, 1)
        write(safetensors, tmp_path, make())


def on_disk_again(optimizer):
    """Asks for the anchors in memory after all."""
    optimizer.param_groups[0]["anchor_device"] = None
    try:
        run(optimizer, optimizer.param_groups[0]["params"], 1)
    finally:
        optimizer.param_groups[0]["anchor_device"] = "disk"


def test_a_step_in_backward_refuses_them_too(safetensors, tmp_path):
    write(safetensors, tmp_path, make())
    optimizer, params, file = on_disk(tmp_path)
    rewrite(file, "shorter")
    before = copies(params)
    with rft.StepInBackward(optimizer), pytest.raises(RuntimeError, match="was written after"):
        sum(p.sum() for p in params).backward()
    assert all(map(torch.equal, params, before))


def test_a_digest_is_not_taken_of_a_file_that_was_written(safetensors, tmp_path):
    write(safetensors, tmp_path, make())
    optimizer, _, file = on_disk(tmp_path)
    rewrite(file, "of the same length")
    with pytest.raises(RuntimeError, match="was written after"):
        optimizer.state_dict()


@pytest.mark.parametrize("how", HARMLESS)
def test_anchors_on_disk_outlive_the_name_of_their_file(safetensors, tmp_path, how):
    results = []
    for rewritten in (False, True):
        write(safetensors, tmp_path, make())
        optimizer, params, file = on_disk(tmp_path)
        if rewritten:
            rewrite(file, how)
        run(optimizer, params, 2)
        optimizer.telemetry()
        results.append(params)
    assert all(map(torch.equal, *results))


def test_a_copy_of_an_optimizer_has_its_anchors_in_memory(safetensors, tmp_path):
    write(safetensors, tmp_path, make())
    optimizer, _, file = on_disk(tmp_path)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.param_groups[0]["anchor_device"] is None
        assert optimizer.param_groups[0]["anchor_device"] == "disk"
    rewrite(file, "shorter")
    run(twin, twin.param_groups[0]["params"], 1)


def test_a_checkpoint_does_not_move_anchors(safetensors, tmp_path):
    """One without anchors leaves ours where they are. Those of a checkpoint come into memory."""
    write(safetensors, tmp_path, make())
    disk, _, file = on_disk(tmp_path)
    memory = rft.AdamSPD(zip(NAMES, copies(make()), strict=False), lr=1e-2, anchor=tmp_path)
    of_disk, of_memory = saved_and_loaded(disk.state_dict()), saved_and_loaded(memory.state_dict())
    disk.load_state_dict(of_memory)
    memory.load_state_dict(of_disk)
    assert [o.param_groups[0]["anchor_device"] for o in (disk, memory)] == ["disk", None]
    rewrite(file, "shorter")
    run(memory, memory.param_groups[0]["params"], 1)
    initial = rft.AdamSPD(zip(NAMES, copies(make()), strict=False)).state_dict()
    disk.load_state_dict(saved_and_loaded(initial))
    assert disk.param_groups[0]["anchor_device"] is None
    run(disk, disk.param_groups[0]["params"], 1)


def transpose(params):
    """Lays out a parameter otherwise in memory, at the same weights."""
    params[2].data = params[2].detach().t().contiguous().t()
    return {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"anchor": "initial"}, "leaves anchors in their file, and the anchor here is 'initial'"),
        (lambda p: {"anchor": [q.detach() for q in p]}, "and the anchor here is 'given'"),
        (lambda p: {"anchor_dtype": torch.bfloat16}, "'w0' in a file: it is torch.float32 in the file"),
        (transpose, "'w2' .* another memory layout in the file"),
    ],
)
def test_what_cannot_stay_on_disk_is_named(safetensors, tmp_path, change, message):
    params = make()
    write(safetensors, tmp_path, params)
    own = {"anchor": tmp_path, **change(params)}
    with pytest.raises(ValueError, match=f"anchor_device='disk' .*{message}.*leave anchor_device None"):
        rft.AdamSPD(zip(NAMES, params, strict=False), anchor_device="disk", **own)


def test_what_is_in_memory_does_not_go_to_disk(safetensors, tmp_path):
    write(safetensors, tmp_path, make())
    params = make()
    optimizer = rft.AdamSPD(zip(NAMES, params, strict=False), anchor=tmp_path)
    optimizer.param_groups[0]["anchor_device"] = "disk"
    with pytest.raises(ValueError, match="it is not in a file; leave anchor_device None"):
        run(optimizer, params, 1)
    groups = [
        {"params": [(NAMES[0], params[0])]},
        {"params": [("head", params[1])], "method": "none"},
        {"params": [("lora", params[2])], "anchor": "zero"},
    ]
    run(rft.AdamSPD(groups, anchor=tmp_path, anchor_device="disk"), params[:3], 1)


def test_a_file_that_is_replaced_while_it_is_read_is_refused(safetensors, tmp_path, monkeypatch):
    write(safetensors, tmp_path, make())
    file, real = tmp_path / "model.safetensors", __import__("safetensors").safe_open
    for how, message in (("renamed over", "was replaced while"), ("of the same length", "was written after")):

        def safe_open(*args, how=how, **kwargs):
            opened = real(*args, **kwargs)
            rewrite(file, how)
            return opened

        monkeypatch.setattr("safetensors.safe_open", safe_open)
        with pytest.raises(RuntimeError, match=message):
            rft.AdamSPD(zip(NAMES, make(), strict=False), anchor=tmp_path)


def test_the_file_is_asked_once_a_step(safetensors, tmp_path, monkeypatch):
    write(safetensors, tmp_path, make(), files=2)
    optimizer, params, _ = on_disk(tmp_path)
    run(optimizer, params, 1)
    asked, real = [], os.fstat
    monkeypatch.setattr(os, "fstat", lambda descriptor: asked.append(descriptor) or real(descriptor))
    run(optimizer, params, 3)
    assert len(asked) == 3 * len(set(asked)) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's account of its memory")
@pytest.mark.parametrize(("device", "least", "most"), [("disk", 0, 10), (None, 90, 106)])
def test_the_memory_of_anchors_in_a_file(safetensors, tmp_path, device, least, most):
    """96 MB of anchors are copied, or read from the file's pages. None of these become the process's own then. No
    mapping is left of a file that was read."""
    program = f"""
import re, torch, robustft_kernels as rft
def memory(kind):
    return int(re.search(rf"{{kind}}:\\s+(\\d+) kB", open("/proc/self/smaps_rollup").read())[1]) / 1024
param = torch.nn.Parameter(torch.full((24 * 2**20,), 0.3))
param.grad = torch.full_like(param, 0.1)
torch.optim.SGD([param], lr=0.1).step()
before = memory("Anonymous")
optimizer = rft.SGDL2SP([("w0", param)], lr=0.1, anchor={str(tmp_path)!r}, anchor_device={device!r})
optimizer.step()
maps = open("/proc/self/maps").read().count("model.safetensors")
print(memory("Anonymous") - before, float(param[0]), maps)
"""
    write(safetensors, tmp_path, [nn.Parameter(torch.full((24 * 2**20,), 0.1))])
    out = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True).stdout
    own, moved, maps = map(float, out.split())
    assert least <= own < most
    assert moved == pytest.approx(0.1 + 0.9 * (0.28 - 0.1), rel=1e-5), "it was pulled toward the file's weights"
    assert bool(maps) == (device == "disk")
