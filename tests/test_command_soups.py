"""robustft soup and robustft stock: the bits of the functions, in spans, and what is refused."""

import json
import math

import pytest
import torch

import robustft_kernels as rft
from robustft_kernels.finetune import soups

pytest.importorskip("click")
safetensors = pytest.importorskip("safetensors.torch")
from tests.test_command import command, loaded, refused, save_sharded, weights  # noqa: E402 - needs both
from tests.test_command_scale import linux_alone, make_pair, measured  # noqa: E402


def moved(seed):
    """Weights that went from those of seed 0 partly in one direction. The bias and the integers did not go."""
    of, way = (torch.Generator().manual_seed(s) for s in (100 + seed, 99))
    state = weights(0)
    for name, value in state.items():
        if value.is_floating_point() and "bias" not in name:
            value += sum(torch.randn(value.shape, generator=g) for g in (of, way)).to(value.dtype)
    return state | {"position_ids": torch.arange(12) + seed}


@pytest.fixture(params=[50, 2**18], ids=["short spans", "long spans"])
def places(tmp_path, monkeypatch, request):
    """BASE, and three TUNED: sharded, in one file, and in torch's form with other names."""
    monkeypatch.setattr(soups, "PIECE", request.param)
    save_sharded(tmp_path / "base", weights(0))
    save_sharded(tmp_path / "1", moved(1), {"format": "pt", "made": "by tests"})
    (tmp_path / "1" / "config.json").write_text("{}")
    safetensors.save_file(moved(2), tmp_path / "2.safetensors")
    torch.save({f"module.{name}": value for name, value in moved(3).items()}, tmp_path / "3.pt")
    return [tmp_path / "base", tmp_path / "1", tmp_path / "2.safetensors", tmp_path / "3.pt"]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("what", ["soup", "stock"])
def test_bits_are_those_of_the_function(places, tmp_path, capsys, what, count):
    base, *tuned = places
    given = [moved(k + 1) for k in range(count)]
    out, told = tmp_path / "out", tmp_path / "t.json"
    if what == "soup":
        assert command("soup", *tuned[:count], "--out", out) == 0
        expected = rft.soup(given, buffers="interpolate")
    else:
        assert command("stock", base, *tuned[:count], "--out", out, "--json", told) == 0
        expected = rft.model_stock(weights(0), given, buffers="interpolate")
        ratios = rft.stock_ratios(weights(0), given, buffers="interpolate")
        written = json.loads(told.read_text())
        assert {name: math.nan if t is None else t for name, t in written["ratios"].items()} == pytest.approx(
            ratios, abs=0, nan_ok=True
        )
        assert written["integers"] == ["position_ids", "mask"]
        assert written["tuned"] == list(map(str, tuned[:count]))
        known = sorted(t for t in ratios.values() if t == t)
        line = capsys.readouterr().out.splitlines()[0]
        assert f"from {known[0]:.3f} (" in line
        assert line.endswith("2 tensors moved in no TUNED")  # the bias, and the empty one
    found = loaded(out)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert not torch.equal(found["layer.weight"], given[0]["layer.weight"])
    assert (out / "config.json").read_text() == "{}"
    with safetensors.safe_open(next(out.glob("*.safetensors")), "pt") as file:
        assert file.metadata()["made"] == "by tests"


def test_what_is_excluded_stays_as_in_the_first(places, tmp_path, capsys):
    base, first, second, _ = places
    state = moved(2) | {"head.weight": torch.ones(3)}
    safetensors.save_file(state, second)
    err = refused(capsys, 1, "stock", base, first, second, "--out", tmp_path / "out")
    assert "TUNED 1 lacks 'head.weight', which TUNED 2 has" in err
    assert (
        command("stock", base, first, second, "--out", tmp_path / "out", "--exclude", "head", "--exclude", "lay*") == 0
    )
    found, own = loaded(tmp_path / "out"), moved(1)
    assert torch.equal(found["layer.weight"], own["layer.weight"])
    assert not torch.equal(found["embed.weight"], own["embed.weight"])
    assert "matches no tensor of TUNED 1 or TUNED 2" in refused(
        capsys, 1, "soup", first, second, "--out", tmp_path / "o", "--exclude", "no"
    )


def test_refusals(places, tmp_path, capsys):
    base, first, second, _ = places
    out = ["--out", tmp_path / "out"]
    assert "two or more TUNED" in refused(capsys, 2, "stock", base, first, *out)
    assert "two or more TUNED" in refused(capsys, 2, "soup", first, *out)
    assert "given twice" in refused(capsys, 2, "soup", first, second, first, *out)
    assert "--out" in refused(capsys, 2, "soup", first, second)
    assert "is read" in refused(capsys, 1, "stock", base, first, second, "--out", base, "--force")
    state = moved(2)
    state["embed.weight"][3, 3] = float("nan")
    safetensors.save_file(state, second)
    before = set(tmp_path.rglob("*"))
    assert "'embed.weight' has no angles" in refused(capsys, 1, "stock", base, first, second, *out)
    assert set(tmp_path.rglob("*")) == before
    (tmp_path / "t.json").write_text("")
    given = [*out, "--json", tmp_path / "t.json"]
    assert "--force" in refused(capsys, 1, "stock", base, first, second, *given)


@linux_alone
def test_memory(tmp_path):
    """96 MB on each side, in 2 shards of 4 tensors. What is added is less than the three sides of a tensor, 36 MB."""
    base, first = make_pair(tmp_path, 96 * 2**20, 2)
    (tmp_path / "more").mkdir()
    _, second = make_pair(tmp_path / "more", 96 * 2**20, 2)
    _, before, after = measured("stock", base, first, second, "--out", tmp_path / "out")
    assert after - before < 36 * 2**20
