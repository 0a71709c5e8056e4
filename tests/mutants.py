"""Proof that the tests have power: small faults, one at a time, each of which some test must see.

make test-mutants                                     all rows
.venv/bin/python -m tests.mutants --pick schedule     those whose name or file has this text
.venv/bin/python -m tests.mutants --list              shows them, runs nothing

It works in a copy of the files, in a temporary folder: the checkout stays as it is. The unmutated copy must pass first.
Then, for each row, one line of source is changed, the tests that concern it run, and the change is taken back. A row
whose tests all pass has *survived*: then a test is missing, or the change is no fault. Exit codes: 0 if all rows are
caught, 1 if any survived, 2 if a row or the copy is not in order.

The rows are in mutant_rows.py, which says how one must be, and in mutant_rows_csrc.py.
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

from .mutant_rows import PACKAGE
from .mutant_rows_csrc import CSRC

MUTANTS = (*PACKAGE, *CSRC)
ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds for a mutant's tests; then they hang, and that too is caught
LONG = 3600  # for a build, and for the tests without a mutant
PYTEST = ["-m", "pytest", "-q", "-p", "no:benchmark", "--tb=no", "-n", "2", "-m", "not (full or exhaustive)"]


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
                 "ROBUSTFT_CUDA": "0"},  # tests/ptx compiles what it needs of the kernels
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
