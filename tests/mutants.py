"""Proof that the tests have power: small faults, one at a time, each of which some test must see.

make test-mutants                                     all rows
.venv/bin/python -m tests.mutants --pick schedule     those whose name or file has this text
.venv/bin/python -m tests.mutants --list              shows them, runs nothing

It works in a copy of the files, in a temporary folder: the checkout stays as it is. The unmutated copy must pass first.
Then, for each row, one line of source is changed, the tests that concern it run, and the change is taken back. A row
whose tests all pass has *survived*: then a test is missing, or the change is no fault. Exit codes: 0 if all rows are
caught, 1 if any survived, 2 if a row or the copy is not in order.

To add a row: the name says what is wrong then, in plain words. `old` must be in the file exactly once; take more of the
line, or two lines, where it is not. Think through that `new` is a real fault, which changes a result somewhere, and
that it compiles or can be imported: a change that breaks the build shows nothing. What only a race shows needs a test
that repeats it often. `tests` are files in tests/, `pick` is an expression for pytest -k that leaves out what
cannot matter, such as other backends. Only the default tier runs.
"""

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds for a mutant's tests; then they hang, and that too is caught
LONG = 3600  # for a build, and for the tests without a mutant
PYTEST = ["-m", "pytest", "-q", "-p", "no:benchmark", "--tb=no", "-n", "2", "-m", "not full"]


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    pick: str = ""


STEPS = ("test_steps.py",)
ORACLE, NATIVE, TRITON = "equals_oracle and native", "native", "equal and triton"

MUTANTS = [
    # The package in Python.
    Mutant("an anchor is the weights themselves, and is written with them", "robustft_kernels/anchors.py",
           "keep_anchor(param, param, own, device, copy=True)", "keep_anchor(param, param, own, device)",
           ("test_optimizers.py",), "anchor or methods"),
    Mutant("an anchor in the memory of a parameter is not refused", "robustft_kernels/anchors.py",
           "if anchor.numel() and anchor.untyped_storage()", "if False and anchor.untyped_storage()",
           ("test_optimizers.py",), "bad"),
    Mutant("state_dict leaves out the learned radius", "robustft_kernels/anchored.py",
           'saved["state"] = {key: of for key, of in saved["state"].items() if of}',
           'saved["state"] = {k: {n: v for n, v in of.items() if n != "radius_state"} for k, of in '
           'saved["state"].items()}', ("test_methods.py", "test_state.py"), "resume"),
    Mutant("the buffer of a torch checkpoint counts as never updated", "robustft_kernels/state.py",
           'loaded.setdefault("step", torch.ones((), ', 'loaded.setdefault("step", torch.zeros((), ',
           ("test_state.py",), "torch_checkpoints"),
    Mutant("the step count of an old momentum goes on with a new one", "robustft_kernels/state.py",
           'kept.pop("step", None)  # it', 'pass  # it', ("test_optimizers.py",), "momentum"),
    Mutant("saved tensors of another shape are not refused", "robustft_kernels/state.py",
           'key != "step" and tuple(value.shape) != expected', 'key != "step" and value.dim() != len(expected)',
           ("test_state.py",), "loading_checks"),
    Mutant("a plan holds although its state was replaced", "robustft_kernels/plan.py",
           "ops.fingerprint(params, list(kept.values()), self._addresses)",
           "ops.fingerprint(params, [], self._addresses)", ("test_optimizers.py", "test_state.py"),
           "plan_is_built or memory_moved"),
    Mutant("a plan holds although its method was changed", "robustft_kernels/plan.py",
           'STRUCTURE = ("rule", "anchor",', 'STRUCTURE = ("anchor",', ("test_optimizers.py",), "plan_is_built"),
    Mutant("clipping scales small gradients up", "robustft_kernels/plan.py",
           "max_grad_norm).clamp(min=1)", "max_grad_norm)", ("test_clipping.py",), "native or reference"),
    Mutant("the fingerprint in Python does not see a gradient", "robustft_kernels/ops.py",
           "None if p.grad is None else _metadata(p.grad)", "None", ("test_ops.py",), "fingerprint"),
    Mutant("hyper-parameters stay what they were at the first step", "robustft_kernels/launch.py",
           "if rows != self._rows:", "if not self._rows:", ("test_protocol.py",), "schedulers"),
    Mutant("a beta of 1 is not refused", "robustft_kernels/bases.py",
           "if not 0 <= float(beta) < 1:", "if not 0 <= float(beta) <= 1:",
           ("test_optimizers.py", "test_methods.py"), "bad or range"),
    Mutant("SPD, decided in torch, pulls where progress is consistent too", "robustft_kernels/decide.py",
           "fires = (grad_dot_delta > 0) & (gain > 0)", "fires = (gain > 0)", ("test_wrapper.py",), "equals_the_fused"),
    Mutant("steps in backward take the random bits of the first parameter", "robustft_kernels/in_backward.py",
           "found, [place])", "found, [0])", ("test_in_backward.py",), "bit_for_bit"),
    Mutant("rows of a part are taken for the first rows of all", "robustft_kernels/sharding.py",
           "return int(offset[0])", "return 0 * int(offset[0])", ("test_spread.py",), "any_mesh"),
    Mutant("over processes a learned radius has no upper bound", "robustft_kernels/spread.py",
           "torch.where(some, torch.minimum(radii, most), radii)", "radii", ("test_spread.py",), "any_mesh"),
    Mutant("the wrapper measures the gradients of the last evaluation", "robustft_kernels/wrapper.py",
           "            if not evaluations:\n                self._before()", "            self._before()",
           ("test_wrapper.py",), "closure or several_times"),
    Mutant("the wrapper does not save its anchors", "robustft_kernels/wrapper.py",
           '{**of.get(key, {}), "anchor": self._anchors[param]}', '{**of.get(key, {})}',
           ("test_wrapper_state.py",), "resume"),
    Mutant("the wrapper pulls although the step was skipped", "robustft_kernels/wrapper.py",
           'self.__dict__.get("found_inf"))', "None)", ("test_wrapper_state.py",), "scaler"),
    Mutant("what the wrapper measured before the step is overwritten after it", "robustft_kernels/around.py",
           "[: self._twice]), :2].clone()", "[: self._twice]), :2]", ("test_wrapper.py",), "equals_the_fused"),
    Mutant("TPGM-C's penalty has half of its slope", "robustft_kernels/tpgm.py",
           "slopes = 2 * self.radius_penalty * radii", "slopes = self.radius_penalty * radii",
           ("test_tpgm.py",), "slopes or plain_torch"),
    Mutant("TPGM updates a call too early", "robustft_kernels/tpgm.py",
           "else self.f_proj - 1)", "else 0)", ("test_tpgm.py",), "f_proj"),
    Mutant("the MARS norm is the sum of the rows", "robustft_kernels/projection.py",
           'return self._fold(sizes, "max", 0)', 'return self._fold(sizes, "sum", 0)', ("test_projection.py",)),
    Mutant("a radius of 0 or nan is not refused", "robustft_kernels/projection.py",
           "not isinstance(value, Tensor) and not value > 0", "not isinstance(value, Tensor) and value < 0",
           ("test_projection.py",), "bad_input"),
    Mutant("WiSE-FT rounds weights that did not move", "robustft_kernels/wise.py",
           "torch.where(start == end, end, start * (1 - alpha) + end * alpha)", "start * (1 - alpha) + end * alpha",
           ("test_wise.py",), "ends or dtypes"),
    Mutant("telemetry tells the deviation before the pull", "robustft_kernels/telemetry.py",
           "else sizes) * alphas).max())", "else sizes)).max())", ("test_telemetry.py",), "tells_what"),
    Mutant("layerwise decay begins a layer too early", "robustft_kernels/param_groups.py",
           "decay ** (len(layers) - 1 - k)", "decay ** (len(layers) - k)", ("test_param_groups.py",), "layerwise"),
    # The Triton kernels, in the interpreter.
    Mutant("Triton: the first moment's correction has the second's beta", "triton_kernels/base.py",
           "(lr / (1 - power(beta1, t))).to(T)", "(lr / (1 - power(beta2, t))).to(T)", STEPS, f"{TRITON} and adamw"),
    Mutant("Triton: amsgrad takes the last second moment, not the largest", "triton_kernels/base.py",
           "tl.where((v > v_max) | (v != v), v, v_max)", "v", STEPS, f"{TRITON} and amsgrad"),
    Mutant("Triton: a row whose elements cross their anchor is mismeasured", "triton_kernels/measure.py",
           "tl.where(tl.abs(u) <= size, tl.where(d < 0, -u, u), tl.abs(d + u) - size)", "tl.where(d < 0, -u, u)",
           STEPS, f"{TRITON} and mars"),
    Mutant("Triton: the fold reads one partial too many", "triton_kernels/measure.py",
           "inside = chunk < chunks", "inside = chunk <= chunks", STEPS, f"{TRITON} and l2"),
    Mutant("Triton: FTP's k is ignored", "triton_kernels/decide.py",
           "tl.where(slope > 0, k * slope, slope)", "slope", ("test_steps.py", "test_methods.py"),
           "triton and ftp"),
    Mutant("Triton: random bits are mixed once only", "triton_kernels/chunk.py",
           "mix(mix(low ^ key) + mix(key + high))", "mix((low ^ key) + mix(key + high))",
           ("test_precision.py",), "triton and bits"),
    Mutant("Triton: rounding to bfloat16 truncates", "triton_kernels/chunk.py",
           "(bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000", "bits & 0xFFFF0000", STEPS, "triton and storage"),
    Mutant("Triton: the first chunk to finish folds, not the last", "triton_kernels/sweeps.py",
           'last = tl.atomic_add(counters + i, 1, sem="acq_rel") == chunks - 1',
           'last = tl.atomic_add(counters + i, 1, sem="acq_rel") == 0', STEPS, f"{TRITON} and l2"),
    Mutant("Triton: gradients are multiplied by their scale", "triton_kernels/sweeps.py",
           "factor = factor / tl.load(grad_scale)", "factor = factor * tl.load(grad_scale)",
           ("test_precision.py",), "triton and (unscaled or grad_scaler)"),
    Mutant("Triton: MARS-SP counts the largest row from its chunk", "triton_kernels/row_sweeps.py",
           "(row + first + at).to(tl.float64)", "(first + at).to(tl.float64)", STEPS, "triton and mars_sp"),
    Mutant("Triton: a learned radius has no upper bound", "triton_kernels/row_sweeps.py",
           "tl.minimum(tl.load(radius), n + ROW_EPS)", "tl.load(radius)", ("test_steps.py", "test_methods.py"),
           "triton and ftp"),
    Mutant("Triton: the places of rows within rows are wrong", "triton_kernels/rows.py",
           "e // stride * (stride * tl.load(tensor + ROWS)) + e % stride", "e // stride * stride + e % stride",
           STEPS, "triton and (mars or ftp)"),
    Mutant("Triton: the norm's mask is dropped", "triton_kernels/norm.py",
           "load(grad, begin + lane, lane < n,", "load(grad, begin + lane, lane >= 0,",
           ("test_clipping.py",), "triton"),
    Mutant("Triton: all tensors have the first group's hyper-parameters", "triton_kernels/table.py",
           "entry.chunks,\n        entry.group,", "entry.chunks,\n        0,", ("test_optimizers.py",),
           "triton and groups_mix"),
    Mutant("Triton: changed hyper-parameters stay on the host", "triton_kernels/table.py",
           "and not self._captured and torch.equal(buffer, self._sent)", "and not self._captured",
           ("test_triton.py", "test_optimizers.py"), "triton and (repeats or uploads or none_equals)"),
    Mutant("Triton: both moments take the same random bits", "triton_kernels/chunk.py",
           "dither(s1, bits & 0xFFFF)", "dither(s1, bits >> 16)", ("test_precision.py",), "triton and moments"),
    Mutant("Triton: the pull takes the random bits of the step", "triton_kernels/chunk.py",
           "rounding_key(seed, t, PULL_KEY)", "rounding_key(seed, t, STEP_KEY)",
           ("test_precision.py",), "triton and same_bits"),
    Mutant("Triton: lanes beyond a tensor's end are measured", "triton_kernels/sweeps.py",
           "new = tl.where(inside, new, 0.0)  # where eps", "new = new  # where eps", STEPS, "triton and without_eps"),
    Mutant("Triton: lanes beyond a row's end are measured", "triton_kernels/rows.py",
           "new = tl.where(inside, new, 0.0)  # where eps", "new = new  # where eps", STEPS, "triton and without_eps"),
    # The native backend; every row builds it anew.
    Mutant("AdamW: the second moment is not corrected", "csrc/cpu/base.h",
           "T(1 / std::sqrt(1 - std::pow(h.beta2, t)))", "T(1)", STEPS, ORACLE),
    Mutant("SPD fires at its first step too", "csrc/cpu/decide.h",
           "m.grad_dot_delta > 0 && m.gain > 0", "m.grad_dot_delta >= 0 && m.gain > 0", STEPS, "native and first_step"),
    Mutant("AdamW: eps is inside the root", "csrc/cpu/base.h",
           "(root<T>(amsgrad ? state[2] : v) * root_scale + eps)",
           "root<T>((amsgrad ? state[2] : v) * root_scale * root_scale + eps)", STEPS, ORACLE),
    Mutant("AdamW: the decay goes through the moments too", "csrc/cpu/base.h",
           "const Vec<T> g = sign * grad;\n", "const Vec<T> g = sign * grad + (1 - decay) * param;\n", STEPS, ORACLE),
    Mutant("SGD: the first gradient is dampened", "csrc/cpu/base.h",
           "t > 1 && h.momentum ? 1 - h.dampening", "h.momentum ? 1 - h.dampening", STEPS, ORACLE),
    Mutant("size and gain are swapped", "csrc/cpu/measure.h",
           "sum(before_, used), sum(gain_, used)}", "sum(gain_, used), sum(before_, used)}", STEPS, ORACLE),
    Mutant("SPD's pull goes beyond the anchor", "csrc/cpu/decide.h",
           "fires ? 1 - std::min(1.0, strength * ratio)", "fires ? 1 - strength * ratio", STEPS, "native and capped"),
    Mutant("the second moment of FTP's slope has the first's beta", "csrc/cpu/decide.h",
           "(1 - h.beta2) * slope * slope", "(1 - h.beta1) * slope * slope", ("test_steps.py", "test_methods.py"),
           "native and ftp"),
    Mutant("a learned radius has no lower bound", "csrc/cpu/decide.h",
           "std::max(kSmallest, radius.value - h.lr * m / (std::sqrt(v) + 1e-8))",
           "radius.value - h.lr * m / (std::sqrt(v) + 1e-8)", ("test_steps.py", "test_methods.py"), "native and ftp"),
    Mutant("a pull by 1 moves the last bits", "csrc/cpu/pull.h",
           "alpha == 0 ? anchor : alpha == 1 ? param : between", "alpha == 0 ? anchor : between",
           ("test_still.py",), NATIVE),
    Mutant("ties go up in bfloat16", "csrc/rounding.h",
           "(bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u", "(bits + 0x8000u) & 0xffff0000u",
           STEPS, "native and storage"),
    Mutant("every step draws the same random bits", "csrc/rounding.h",
           "uint32_t(t) * 4 + uint32_t(phase)", "4 + uint32_t(phase)",
           ("test_precision.py",), "native and bits"),
    Mutant("a row that is gathered goes on in the wrong place", "csrc/chunk.h",
           "left = rows.stride - at % rows.stride;  // of", "left = rows.stride;  // of", STEPS, "native and equal"),
    Mutant("master weights count although somebody wrote the weights", "csrc/chunk.h",
           "nearest(dtype, kept) == shown ? kept : shown", "kept", STEPS, ORACLE),
    Mutant("the lanes of a register are counted from 1", "csrc/vector.h", "v[l] = T(l);", "v[l] = T(l + 1);",
           STEPS, ORACLE),
    Mutant("MARS-SP pushes every row", "csrc/cpu/sweeps.inc",
           "terms.sign = T(row == p.penalty.row ? p.penalty.sign : 0);", "terms.sign = T(p.penalty.sign);",
           STEPS, "native and mars_sp"),
    Mutant("schedule: a tensor is decided one piece too early", "csrc/cpu/schedule.cpp",
           "if (progress->unstepped.fetch_sub(1, std::memory_order_acq_rel) > 1) return;",
           "if (progress->unstepped.fetch_sub(1, std::memory_order_acq_rel) > 2) return;", STEPS, ORACLE),
    Mutant("schedule: pulls do not wait for the tensor's other pieces", "csrc/cpu/schedule.cpp",
           "while (run.is_decided(stepped)) pull();", "while (!stepped.empty()) pull();", STEPS, ORACLE),
    Mutant("schedule: helpers pull again what is pulled", "csrc/cpu/schedule.cpp",
           "if (progress_[j]->pulls.take(i)) pull", "pull", STEPS, ORACLE),
    Mutant("schedule: pieces of several rows put their sums in the wrong place", "csrc/cpu/schedule.cpp",
           "return split() ? i : i * together_;", "return i;", STEPS, "native and mars"),
    Mutant("both moments take the same random bits", "csrc/chunk.h",
           "dithered(get(second + i), bits & 0xffff)", "dithered(get(second + i), bits >> 16)",
           ("test_precision.py",), "native and moments"),
    Mutant("schedule: a thread does not wait for what others decide", "csrc/cpu/schedule.cpp",
           "for (; !stepped.empty(); pull()) wait_for(run.progress_[stepped.front().first]->decided);",
           "while (!stepped.empty()) pull();", STEPS, "native and threads"),
    Mutant("MARS-SP takes the smallest row", "csrc/cpu/schedule.cpp",
           "if (found[i].before > found[largest].before)", "if (found[i].before < found[largest].before)",
           STEPS, "native and mars_sp"),
    Mutant("a step to maximize minimizes", "csrc/bindings.cpp",
           "(h.maximize ? -1 : 1) / scale", "1 / scale", STEPS, ORACLE),
    Mutant("a step is made although a gradient is infinite", "csrc/bindings.cpp",
           "if (found_inf && found_inf->item<double>() != 0) return;\n", "",
           ("test_precision.py",), "native and found_inf"),
    Mutant("too many anchors are not refused", "csrc/bindings.cpp",
           "param_feed.check_all_taken(), anchor_feed.check_all_taken(), ", "param_feed.check_all_taken(), ",
           ("test_ops.py",), "refuse"),
    Mutant("the fingerprint does not see the form of a gradient", "csrc/bindings.cpp",
           "if (grad.defined()) add_metadata(grad);", "", ("test_ops.py",), "fingerprint"),
]  # fmt: skip


class Failure(Exception):
    """A row, or the copy, is not in order."""


def check(rows):
    """Raises Failure naming the first row that does not fit the files."""
    for row in rows:
        if (n := (ROOT / row.file).read_text().count(row.old)) != 1:
            raise Failure(f"{row.name!r}: its `old` is {n} times in {row.file}, not once: {row.old!r}")
        if row.old == row.new:
            raise Failure(f"{row.name!r} changes nothing")
        if lacking := [test for test in row.tests if not (ROOT / "tests" / test).is_file()]:
            raise Failure(f"{row.name!r}: there is no tests/{lacking[0]}")
    if len({row.name for row in rows}) != len(rows):
        raise Failure("two rows have the same name")


class Copy:
    """The files of the project in a folder of their own, where they can be changed, built and tested."""

    def __init__(self, folder):
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
        for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        (folder / "robustft_kernels" / "triton_kernels").symlink_to(Path("..", "triton_kernels"))
        self._built = ""  # the state of csrc that the extension was built from

    def run(self, *args, limit):
        """Python with these arguments: its exit code, None where it took too long, and what it printed."""
        process = subprocess.Popen(
            [sys.executable, *args], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "MAX_JOBS": "2",
                 "OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # it leads a group, with its workers and their programs
                process.communicate()
        return process.returncode, output

    def build(self):
        """Builds the extension, if csrc is not what it was built from."""
        digest = hashlib.sha256()
        for path in sorted(p for p in (self.folder / "csrc").rglob("*") if p.is_file()):
            digest.update(path.read_bytes())
        if digest.hexdigest() == self._built:
            return
        self._built = ""
        for old in (self.folder / "robustft_kernels").glob("_native*.so"):
            old.unlink()  # setup.py goes on without it where the compiler fails
        code, output = self.run("setup.py", "build_ext", "--inplace", limit=LONG)
        if code or "did not build" in output or not list((self.folder / "robustft_kernels").glob("_native*.so")):
            raise Failure("the extension does not build:\n" + "\n".join(re.findall(".*error.*", output)[:10]))
        self._built = digest.hexdigest()

    def check_imports(self):
        """Raises Failure where the tests would import something else than this copy."""
        names = ("robustft_kernels", "robustft_kernels._native", "robustft_kernels.triton_kernels", "tests")
        program = f"import importlib\nfor n in {names}: print(importlib.import_module(n).__file__)"
        code, output = self.run("-c", program, limit=LONG)
        if code or not all(Path(line).is_relative_to(self.folder) for line in output.split()):
            raise Failure(f"the copy does not import itself:\n{output}")

    def test(self, files, pick, *options, limit):
        """Runs tests: their exit code, None where they hang, the ids of those that failed, and the output."""
        chosen = ["-k", pick] if pick else []
        code, output = self.run(*PYTEST, *chosen, *options, *(f"tests/{file}" for file in files), limit=limit)
        return code, [line.partition(" - ")[0] for line in re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.M)], output

    def check_unmutated(self, rows):
        """Raises Failure where what the rows run does not pass as it is."""
        picks = {}
        for row in rows:
            for file in row.tests:
                picks.setdefault(file, {})[row.pick] = True
        files = {}
        for file, of_file in picks.items():
            files.setdefault("" if "" in of_file else " or ".join(f"({pick})" for pick in of_file), []).append(file)
        for pick, of_pick in files.items():
            code, failed, output = self.test(of_pick, pick, limit=LONG)
            if code != 0:
                raise Failure(f"without a mutant {failed or of_pick} fails:\n{output[-2000:]}")

    def judge(self, row):
        """Whether a mutant was caught, and by what."""
        path = self.folder / row.file
        text = path.read_text()
        path.write_text(text.replace(row.old, row.new))
        try:
            self.build()
            code, failed, output = self.test(row.tests, row.pick, "-x", limit=LIMIT)
        finally:
            path.write_text(text)
        if code is None:
            return True, f"by hanging for {LIMIT} s"
        if code == 0:
            return False, ""
        if failed and "::" not in failed[0]:
            raise Failure(f"{failed[0]} cannot be imported:\n{output[-2000:]}")
        if code not in (1, 2) or not failed:
            raise Failure(f"pytest ended with {code}:\n{output[-2000:]}")
        return True, failed[0].removeprefix("tests/")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pick", default="", metavar="TEXT", help="only rows whose name or file has this text")
    parser.add_argument("--list", action="store_true", help="show the rows, and run nothing")
    options = parser.parse_args()
    rows = [row for row in MUTANTS if options.pick in row.name or options.pick in row.file]
    try:
        check(MUTANTS)
        if not rows:
            raise Failure(f"no row has {options.pick!r} in its name or file")
        if options.list:
            print(*(f"{row.file}: {row.name}" for row in rows), f"{len(rows)} mutants", sep="\n")
            return 0
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            return run(Copy(Path(folder).resolve()), rows)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 2


def run(copy, rows):
    """All rows, told as they go and in a table at the end; the exit code."""
    begin = time.monotonic()
    copy.build()
    copy.check_imports()
    copy.check_unmutated(rows)
    print(f"without a mutant all tests pass ({time.monotonic() - begin:.0f} s, the build included)", flush=True)
    table, errors = [], 0
    for row in rows:
        begin = time.monotonic()
        try:
            caught, by = copy.judge(row)
            verdict = "caught" if caught else "survived"
        except Failure as failure:
            verdict, by, errors = "error", str(failure).partition("\n")[0], errors + 1
            print(f"{row.name}: {failure}", file=sys.stderr)
        seconds = time.monotonic() - begin
        table.append((verdict, row.file, row.name, by, f"{seconds:.0f}"))
        print(f"{verdict:8} | {row.file} | {row.name} | {by} | {seconds:.0f} s", flush=True)
    print("\n| verdict | file | what is wrong then | first test to fail | seconds |\n|---|---|---|---|---|")
    for cells in table:
        print("|", " | ".join(cell.replace("|", "\\|") for cell in cells), "|")
    survived = sum(cells[0] == "survived" for cells in table)
    print(f"\n{len(rows)} mutants, {survived} survived, {errors} in error")
    return 2 if errors else 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
