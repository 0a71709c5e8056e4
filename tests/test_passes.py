"""Contests are repeated in several processes, and what is published is the range over these."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import passes, report
from benchmarks.quotes import quoted
from benchmarks.results import Results, Row, merged, read, spread

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "cpu.json"
NAMES = [f"benchmarks/bench_steps.py::bench_it[{k}]" for k in range(20)]


def found(name, ratio, seconds=1.0, trusted=True, absent=(), **told):
    """What one process tells of a contest."""
    contenders = {
        "torch fused": {"ratio": [1.0, 1.0, 1.0], "seconds": 1.0, "host": 0.5, "bytes": 28},
        "AdamSPD": {"ratio": [ratio - 0.01, ratio, ratio + 0.02], "seconds": seconds, "host": 0.5, "bytes": 38},
    }
    told = {"baseline": "torch fused", "watched": "AdamSPD", "ours": ["AdamSPD"], "dtype": "float32", **told}
    told.update(busy=0.3 * (not trusted), trusted=trusted, parameters=9, contenders=contenders)
    return Row("peers", name, {**told, "absent": dict.fromkeys(absent, "it is not installed")})


def test_a_pass_is_all_contests_once_in_an_order_of_its_own():
    turns = [passes.dealt(NAMES, turn, 8) for turn in range(3)]
    for shares in turns:
        assert sorted(sum(shares, [])) == sorted(NAMES)
        assert sorted(map(len, shares)) == [6, 7, 7]
    before = [{share[k]: share[k - 1] for share in shares for k in range(1, len(share))} for shares in turns]
    same = sum(a[name] == b[name] for a in before for b in before if a is not b for name in a.keys() & b.keys())
    assert same <= 6, "in other passes, nearly all contests come after others"
    assert passes.dealt([], 0) == []
    others = [f"bench_steps.py::bench_peers[{k}]" for k in range(5)]
    assert sorted(passes.dealt([*NAMES, *others], 0)[0]) == others, "other packages are imported in one process"
    assert passes.dealt(NAMES, 1) == passes.dealt(NAMES, 1)


def test_processes_are_merged_into_their_range():
    runs = [
        Results({"cores": 2}, [found("b", 1.32, 1.0), found("a", 1.0)]),
        Results({"cores": 2}, [found("b", 1.51, 3.0, trusted=False, absent=["DeepSpeed"])]),
        Results({"cores": 2}, [found("b", 1.40, 2.0)]),
    ]
    results = merged(runs, ["a", "none", "b"])
    alone, row = results.rows
    assert alone == runs[0].rows[1], "what one process has measured stays as it is"
    assert alone.ratio() == [0.99, 1.0, 1.02]
    assert row.ratio() == [1.32, 1.40, 1.51] == spread([1.51, 1.32, 1.40])
    assert row.medians("AdamSPD") == [1.32, 1.51, 1.40]
    assert (alone.processes, row.processes) == (1, 3)
    assert row.contenders["AdamSPD"]["seconds"] == 2.0
    assert row.bytes_say("AdamSPD") == 38 / 28
    assert (row["trusted"], row["busy"], row["absent"]) == (False, 0.3, {"DeepSpeed": "it is not installed"})
    with pytest.raises(ValueError, match="no place for"):
        merged(runs, ["a"])


def test_what_was_absent_once_and_there_later_is_there():
    lacking = found("a", 1.0, absent=["AdamSPD"])
    del lacking.contenders["AdamSPD"]
    (row,) = merged([Results({}, [lacking]), Results({}, [found("a", 1.2)])], ["a"]).rows
    assert row["absent"] == {}
    assert row.medians("AdamSPD") == [1.2]


@pytest.fixture
def pytests(monkeypatch):
    """In place of pytest: a program that finds what it is told to, and keeps what it was asked for."""
    asked, ratios, codes = [], {}, {}

    def run(*args, capture=False):
        names = [arg.partition("::")[2] for arg in args if "::" in arg]
        asked.append((names, [arg for arg in args if "::" not in arg]))
        code = next((codes[name] for name in names if name in codes), 0)
        out = ""
        if "--collect-only" in args:
            once = args[args.index("-m") + 1].startswith("once")
            out = "\n".join(f"benchmarks/bench_steps.py::{name}" for name in (["z"] if once else ["a", "b"]))
        else:
            (file,) = (arg.partition("=")[2] for arg in args if arg.startswith("--benchmark-json="))
            told = [found(name, ratios.get(name, [1.3]).pop(0) if ratios.get(name) else 1.3) for name in names]
            rows = [{"group": row.question, "name": row.name, "extra_info": row.told} for row in told]
            if not code:
                Path(file).write_text(json.dumps({"machine_info": {"packages": {}}, "benchmarks": rows}))
        return type("Done", (), {"returncode": code, "stdout": out, "stderr": ""})

    monkeypatch.setattr(passes.Run, "_run", staticmethod(run))
    run.asked, run.ratios, run.codes = asked, ratios, codes
    return run


def start(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["passes", *map(str, args)])
    passes.main()


def test_three_passes_and_what_is_measured_once(pytests, monkeypatch, tmp_path):
    pytests.ratios["a"] = [1.3, 1.5, 1.4]
    start(monkeypatch, tmp_path / "out" / "found.json", "--threads", "2")
    measured = [(names, args) for names, args in pytests.asked if names]
    assert Counter(name for names, _ in measured for name in names) == {"a": 3, "b": 3, "z": 1}
    assert ["--checked" in args for _, args in measured] == [False, True, True, True], "one process asks the oracle"
    assert all(args[-2:] == ["--threads", "2"] for _, args in measured)
    results = read(tmp_path / "out" / "found.json")
    assert [row.name for row in results.rows] == ["a", "b", "z"]
    assert results.rows[0].ratio() == [1.3, 1.4, 1.5]


def kept(tmp_path, ratios):
    file = tmp_path / "kept.json"
    rows = [merged([Results({}, [found("a", ratio)]) for ratio in ratios], ["a"]).rows[0]]
    passes.write(Results({}, rows), file)
    return file


def test_what_seems_lost_is_measured_again(pytests, monkeypatch, tmp_path, capsys):
    pytests.ratios["a"] = [1.5, 1.51, 1.52, 1.5, 1.35, 1.5]
    start(monkeypatch, tmp_path / "found.json", "--against", kept(tmp_path, [1.3, 1.35, 1.4]))
    assert Counter(name for names, _ in pytests.asked for name in names) == {"a": 6, "b": 3}
    assert "no ratio is worse than kept" in capsys.readouterr().out


def test_what_is_lost_twice_fails(pytests, monkeypatch, tmp_path):
    pytests.ratios["a"] = [1.5, 1.51, 1.52, 1.5, 1.53, 1.5]
    with pytest.raises(SystemExit, match=re.escape("a: AdamSPD 1.50 (1.50–1.53), kept 1.35 (1.30–1.40)")):
        start(monkeypatch, tmp_path / "found.json", "--against", kept(tmp_path, [1.3, 1.35, 1.4]))


def test_a_process_that_fails_is_told_and_the_rest_is_kept(pytests, monkeypatch, tmp_path):
    pytests.codes["z"] = 1
    with pytest.raises(SystemExit, match=re.escape("failed: once (exit code 1)")):
        start(monkeypatch, tmp_path / "found.json")
    assert [row.name for row in read(tmp_path / "found.json").rows] == ["a", "b"]


def test_nothing_is_measured_after_a_wrong_step(pytests, monkeypatch, tmp_path):
    pytests.codes["a"] = passes.WRONG
    with pytest.raises(SystemExit):
        start(monkeypatch, tmp_path / "found.json")
    assert len([names for names, _ in pytests.asked if names]) == 1


def test_the_page_says_what_its_parentheses_are():
    once = found("c", 1.2, once="it takes long", model="MiniLM")
    three = merged([Results({}, [found("a", ratio)]) for ratio in (1.3, 1.4, 1.5)], ["a"]).rows
    text = report.processes(Results({}, [*three, once]))
    assert "in 3 processes" in text
    assert "- MiniLM: it takes long" in text
    assert "In fewer processes" not in text
    assert "some failed: b" in report.processes(Results({}, [*three, found("b", 1.2)]))
    assert "in one process" in report.processes(Results({}, [found("a", 1.2)]))


def test_texts_quote_what_was_kept():
    results = read(KEPT)
    for file in ("README.md", "docs/costs.md"):
        text = (ROOT / file).read_text()
        assert quoted(text, results) == text, f"{file}: python -m benchmarks.report KEPT --quote {file}"


def test_quotes_are_renewed():
    name = "bench_peers[ViT-B/16-torch.float32]"
    rows = merged([Results({}, [found(name, ratio)]) for ratio in (1.3, 1.4, 1.5)], [name]).rows
    text = re.sub(r"range over \d+ processes", "quartiles", (ROOT / "README.md").read_text())
    new = quoted(text, Results({}, rows))
    (line,) = (line for line in new.splitlines() if line.startswith("| ViT-B/16, fp32"))
    assert line == "| ViT-B/16, fp32 | 1.40 (1.30–1.50) | – | – | – |"
    assert "median (range over 3 processes)" in new
    changed = [pair for pair in zip(text.splitlines(), new.splitlines(), strict=True) if pair[0] != pair[1]]
    assert len(changed) == 2
