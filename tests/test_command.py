"""The command robustft on real checkpoints: values, refusals, and what is on the disk afterwards."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import robustft_kernels as rft
from robustft_kernels.command import shards, spans

pytest.importorskip("click")
safetensors = pytest.importorskip("safetensors.torch")
from robustft_kernels.command.cli import run  # noqa: E402 - needs both

ROOT = Path(__file__).parent.parent
INDEX = "model.safetensors.index.json"


def weights(seed):
    """A state dict of all dtypes, with rows shorter and longer than the spans of the tests, and none."""
    of = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(70, 9, generator=of).bfloat16(),
        "layer.weight": torch.randn(5, 300, generator=of),
        "layer.bias": torch.randn(40, generator=of).half(),
        "wide.weight": torch.randn(3, 4, 5, generator=of, dtype=torch.float64),
        "scale": torch.randn((), generator=of),
        "empty": torch.zeros(0, 4),
        "position_ids": torch.arange(12) + seed,
        "mask": torch.tensor([True, False, bool(seed)]),
    }


def save_sharded(folder, state, metadata=None):
    folder.mkdir()
    names = list(state)
    where = {}
    for k, part in enumerate((names[:3], names[3:])):
        file = f"model-{k + 1:05}-of-00002.safetensors"
        safetensors.save_file({name: state[name] for name in part}, folder / file, metadata or {"format": "pt"})
        where.update(dict.fromkeys(part, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


@pytest.fixture(autouse=True)
def _short_spans(monkeypatch):
    monkeypatch.setattr(spans, "SPAN", 64)
    monkeypatch.setattr(shards, "PIECE", 100)


@pytest.fixture
def base(tmp_path):
    save_sharded(tmp_path / "base", weights(0))
    return tmp_path / "base"


@pytest.fixture
def tuned(tmp_path):
    save_sharded(tmp_path / "tuned", weights(1), {"format": "pt", "made": "by tests"})
    (tmp_path / "tuned" / "config.json").write_text('{"model_type": "t"}')
    (tmp_path / "tuned" / "tokenizer.json").write_text("{}")
    (tmp_path / "tuned" / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "tuned" / "trainer_state.json").write_text("{}")
    return tmp_path / "tuned"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def loaded(folder):
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in safetensors.load_file(file).items()
    }


def command(*arguments):
    return run([str(argument) for argument in arguments])


def refused(capsys, code, *arguments):
    """The one line of an error."""
    assert command(*arguments) == code
    err = capsys.readouterr().err.lstrip("\n")  # click ends the line of ^C
    assert err.startswith("robustft: ")
    assert err.count("\n") == 1
    return err


def floats(state):
    return {name: value for name, value in state.items() if value.is_floating_point()}


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_wise_is_what_interpolate_gives(base, tuned, out, alpha):
    assert command("wise", base, tuned, "--alpha", alpha, "--out", out) == 0
    theta_0, expected = weights(0), weights(1)
    moved = floats(expected)
    rft.interpolate_(list(moved.values()), [theta_0[name] for name in moved], alpha)
    found = loaded(out)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert alpha in (0, 1) or not torch.equal(found["layer.weight"], weights(1)["layer.weight"])


def test_what_is_equal_and_not_finite_stays(tmp_path, out):
    for name, end in (("a", 0.0), ("b", 2.0)):
        safetensors.save_file({"x": torch.tensor([float("inf"), -float("inf"), end])}, tmp_path / f"{name}.safetensors")
    assert command("wise", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--out", out) == 0
    assert loaded(out)["x"].tolist() == [float("inf"), -float("inf"), 1.0]


@pytest.mark.parametrize("norm", ["l2", "mars", "mars_rows"])
def test_project_is_what_project_gives(base, tuned, out, norm):
    radius = 20.0 if norm == "mars" else 12.0
    assert command("project", base, tuned, "--radius", radius, "--norm", norm, "--out", out) == 0
    theta_0, expected = weights(0), weights(1)
    moved = floats(expected)
    rft.project_(list(moved.values()), [theta_0[name] for name in moved], radius, norm)
    found = loaded(out)
    within = set()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, msg=lambda m, name=name: f"{name}: {m}")
        if torch.equal(found[name], weights(1)[name]):
            within.add(name)
    assert {"scale", "position_ids", "mask"} <= within
    assert "layer.weight" not in within


@pytest.mark.parametrize("norm", ["l2", "mars"])
def test_compare_tells_the_deviation(base, tuned, tmp_path, capsys, norm):
    file = tmp_path / "told.json"
    assert command("compare", base, tuned, "--norm", norm, "--json", file, "--top", 2) == 0
    told = json.loads(file.read_text())
    theta_0, theta = weights(0), floats(weights(1))
    anchors = [theta_0[name] for name in theta]
    n = dict(zip(theta, rft.deviation(theta.values(), anchors, norm).tolist(), strict=True))
    size = dict(zip(theta, rft.deviation(anchors, None, norm).tolist(), strict=True))
    found = {row["name"]: row for row in told["tensors"]}
    assert found.keys() == theta.keys()
    for name, row in found.items():
        assert row["deviation"] == pytest.approx(n[name], rel=1e-6)
        assert row["base"] == pytest.approx(size[name], rel=1e-6)
        assert row["relative"] == (pytest.approx(n[name] / size[name], rel=1e-6) if size[name] else None)
    relative = [row["relative"] for row in told["tensors"] if row["relative"] is not None]
    assert relative == sorted(relative, reverse=True)
    assert told["integers"] == ["position_ids", "mask"]
    whole = sum(of**2 for of in n.values()) ** 0.5 if norm == "l2" else max(n.values())
    assert told["all"]["deviation"] == pytest.approx(whole, rel=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert told["tensors"][0]["name"] in lines[1]
    assert told["tensors"][1]["name"] in lines[2]
    assert "4 more" in lines[3]


def test_what_is_no_number_comes_first(base, tuned, tmp_path):
    state = weights(1)
    state["layer.bias"][3] = float("nan")
    safetensors.save_file(state, tmp_path / "broken.safetensors")
    assert command("compare", base, tmp_path / "broken.safetensors", "--json", tmp_path / "a.json") == 0
    first = json.loads((tmp_path / "a.json").read_text())["tensors"][0]
    assert (first["name"], first["deviation"]) == ("layer.bias", None)


def test_picture(base, tuned, tmp_path):
    pytest.importorskip("matplotlib")
    assert command("compare", base, tuned, "--picture", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_files_are_those_of_tuned(base, tuned, out):
    assert command("wise", base, tuned, "--out", out) == 0
    names = {path.name for path in tuned.iterdir()} - {"optimizer.pt", "trainer_state.json"}
    assert {path.name for path in out.iterdir()} == names
    for name in ("config.json", "tokenizer.json", INDEX):
        assert (out / name).read_bytes() == (tuned / name).read_bytes()
    for file in tuned.glob("*.safetensors"):
        with safetensors.safe_open(out / file.name, "pt") as new, safetensors.safe_open(file, "pt") as old:
            assert new.metadata() == old.metadata() == {"format": "pt", "made": "by tests"}
            assert new.keys() == old.keys()


@pytest.mark.parametrize("form", ["one file", "folder", "index", "pt", "bin"])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_forms_of_checkpoints(base, tuned, tmp_path, out, form, side):
    """Each form gives what the two sharded folders give."""
    assert command("wise", base, tuned, "--out", tmp_path / "plain") == 0
    state, places = weights(int(side == "tuned")), {"base": base, "tuned": tuned}
    path = tmp_path / {"one file": "x.safetensors", "folder": "f", "index": "x", "pt": "x.pt", "bin": "x.bin"}[form]
    if form == "one file":
        safetensors.save_file(state, path)
    elif form == "folder":
        path.mkdir()
        safetensors.save_file(state, path / "model.safetensors")
    elif form == "index":
        path = places[side] / INDEX
    else:
        torch.save({**state, "epoch": 3}, path)
    assert command("wise", *{**places, side: path}.values(), "--out", out) == 0
    if side == "tuned" and form in ("pt", "bin"):
        found = torch.load(out / path.name, weights_only=True)
        assert found.pop("epoch") == 3
    else:
        found = loaded(out)
    for name, value in loaded(tmp_path / "plain").items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_wrapped_names_and_an_excluded_head(base, tmp_path, out):
    state = {f"module._orig_mod.{name}": value for name, value in weights(1).items()}
    state["module._orig_mod.head.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "t.pt")
    assert command("wise", base, tmp_path / "t.pt", "--out", out, "--exclude", "head") == 0
    found = torch.load(out / "t.pt", weights_only=True)
    assert list(found) == list(state)
    assert torch.equal(found["module._orig_mod.head.weight"], torch.ones(3))


@pytest.mark.parametrize("longer", ["base", "tuned"])
def test_one_prefix(base, tuned, tmp_path, out, capsys, longer):
    """A base model and a model with a head: "bert." stands before all names of one side."""
    assert command("wise", base, tuned, "--out", tmp_path / "plain") == 0
    places = {"base": base, "tuned": tuned}
    state = {f"bert.{name}": value for name, value in weights(int(longer == "tuned")).items()}
    safetensors.save_file({**state, "classifier.weight": torch.ones(2)}, tmp_path / "t.safetensors")
    places[longer] = tmp_path / "t.safetensors"
    refused(capsys, 1, "wise", *places.values(), "--out", out)
    assert command("wise", *places.values(), "--out", out, "--exclude", "classifier") == 0
    found = {name.removeprefix("bert."): value for name, value in loaded(out).items() if "classifier" not in name}
    plain = loaded(tmp_path / "plain")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_tied_tensors_stay_tied(tmp_path, out):
    for name, shift in (("a", 0.0), ("b", 1.0)):
        shared = torch.arange(6.0) + shift
        torch.save({"in": shared, "out": shared}, tmp_path / f"{name}.pt")
    assert command("wise", tmp_path / "a.pt", tmp_path / "b.pt", "--out", out) == 0
    found = torch.load(out / "b.pt", weights_only=True)
    assert found["in"].data_ptr() == found["out"].data_ptr()
    assert torch.equal(found["in"], torch.arange(6.0) + 0.5)


def test_mismatches_are_listed(base, tmp_path, out, capsys):
    state = weights(1)
    state["new.weight"] = state.pop("layer.bias")
    state["layer.weight"] = state["layer.weight"][:4].clone()
    state["scale"] = torch.tensor(3)
    safetensors.save_file(state, tmp_path / "t.safetensors")
    err = refused(capsys, 1, "wise", base, tmp_path / "t.safetensors", "--out", out)
    for told in ("BASE lacks 'new.weight'", "TUNED lacks 'layer.bias'", "'layer.weight' is F32 (4, 300)", "'scale'"):
        assert told in err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "t.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["wise", "nothing", "TUNED", "--out", "OUT"], 1, "there is no"),
        (["wise", "BASE", "TUNED"], 2, "--out"),
        (["wise", "BASE", "TUNED", "--out", "OUT", "--alpha", "2"], 1, "alpha"),
        (["wise", "BASE", "TUNED", "--out", "OUT", "--alpha", "nan"], 1, "alpha"),
        (["wise", "BASE", "TUNED", "--out", "OUT", "--alpha", "x"], 2, "alpha"),
        (["wise", "BASE", "TUNED", "--out", "no/OUT"], 1, "no folder"),
        (["wise", "BASE", "TUNED", "--out", "OUT", "--exclude", "nothing"], 1, "matches no tensor"),
        (["wise", "BASE", "TUNED", "--out", "TUNED"], 1, "is read"),
        (["wise", "BASE", "TUNED", "--out", "TUNED", "--force"], 1, "is read"),
        (["wise", "BASE", "TUNED", "--out", "HERE", "--force"], 1, "is read"),
        (["wise", "BASE", "TUNED/config.json", "--out", "OUT"], 1, "no checkpoint"),
        (["wise", "BASE", "TUNED/optimizer.pt", "--out", "OUT"], 1, "weights alone"),
        (["project", "BASE", "TUNED", "--out", "OUT"], 2, "--radius"),
        (["project", "BASE", "TUNED", "--out", "OUT", "--radius", "0"], 1, "radius"),
        (["project", "BASE", "TUNED", "--out", "OUT", "--radius", "1", "--norm", "l1"], 2, "l1"),
        (["compare", "BASE", "TUNED", "--json", "TUNED/config.json"], 1, "--force"),
        (["compare", "BASE"], 2, "TUNED"),
        (["no-such"], 2, "no-such"),
    ],
)
def test_refusals(base, tuned, out, tmp_path, capsys, monkeypatch, arguments, code, told):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    places = {"BASE": base, "TUNED": tuned, "OUT": out, "HERE": tmp_path}
    given = [str(places.get(argument, argument)) for argument in arguments]
    given = [of.replace("TUNED/", f"{tuned}/") for of in given]
    assert told in refused(capsys, code, *given)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_file_that_is_cut_short(base, tuned, out, capsys):
    file = tuned / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "cut short" in refused(capsys, 1, "wise", base, tuned, "--out", out)


def test_what_has_no_arithmetic(tmp_path, out, capsys):
    for name in ("a", "b"):
        state = {"x": torch.ones(3), "codes": torch.ones(4).to(torch.float8_e4m3fn)}
        safetensors.save_file(state, tmp_path / f"{name}.safetensors")
    line = ["wise", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--out", out]
    assert "'codes' is F8_E4M3" in refused(capsys, 1, *line)
    assert command(*line, "--exclude", "codes") == 0


def test_a_full_disk(base, tuned, out, capsys, monkeypatch):
    free = shutil.disk_usage(base)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert "are free" in refused(capsys, 1, "wise", base, tuned, "--out", out)
    assert not out.exists()


def test_force(base, tuned, out, capsys):
    assert command("wise", base, tuned, "--out", out, "--alpha", 0) == 0
    capsys.readouterr()
    assert "--force" in refused(capsys, 1, "wise", base, tuned, "--out", out, "--alpha", 1)
    assert torch.equal(loaded(out)["layer.weight"], weights(0)["layer.weight"])
    (out / "stale.safetensors").write_bytes(b"")
    assert command("wise", base, tuned, "--out", out, "--alpha", 1, "--force") == 0
    assert torch.equal(loaded(out)["layer.weight"], weights(1)["layer.weight"])
    assert not (out / "stale.safetensors").exists()
    capsys.readouterr()
    (out / "more").mkdir()
    assert "'more'" in refused(capsys, 1, "wise", base, tuned, "--out", out, "--force")
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.txt").write_text("")
    assert "has none" in refused(capsys, 1, "wise", base, tuned, "--out", out, "--force")
    assert (out / "thesis.txt").exists()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_nothing(base, tuned, out, tmp_path, capsys, monkeypatch, there, error):
    if there:
        assert command("wise", base, tuned, "--out", out, "--alpha", 0) == 0
        capsys.readouterr()
    before = set(tmp_path.rglob("*"))
    read, seen = shards.SafetensorsSource.read, []

    def fails(self, name, start, stop):
        if name == "wide.weight":  # of the second shard
            seen.extend(tmp_path.glob(".out*/model-00001*"))
            raise error
        return read(self, name, start, stop)

    monkeypatch.setattr(shards.SafetensorsSource, "read", fails)
    refused(capsys, 1, "wise", base, tuned, "--out", out, "--force")
    assert seen  # the first shard had been written
    assert set(tmp_path.rglob("*")) == before
    if there:
        assert torch.equal(loaded(out)["layer.weight"], weights(0)["layer.weight"])


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}


def test_module_has_no_bar_without_a_terminal(base, tuned, out):
    line = [sys.executable, "-m", "robustft_kernels", "wise", base, tuned, "--out", out]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "6 tensors changed, 2 as in TUNED; 2 other files copied" in done.stdout


@pytest.mark.parametrize("library", ["click", "tqdm", "safetensors"])
def test_a_missing_library_is_one_line(library):
    program = f"import sys; sys.modules[{library!r}] = None\nfrom robustft_kernels.command.entry import main\n"
    program += "sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"robustft: {library} is not installed; pip install robustft_kernels[cli]\n"
