# `make demo` and `make test` need python3 >= 3.10, a C++ compiler and make; they set up the rest in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/* csrc/cpu/* csrc/cuda/*)
RESULTS ?= benchmarks/results/gpu.json

.PHONY: install demo experiment-emoji experiment-linear experiment-sentiment test test-full test-exhaustive \
	test-mutants test-integrations test-ptx lint bench bench-check peers codegen bringup test-gpu bench-gpu docs clean

install: .venv/.installed

.venv/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"python >= 3.10 is needed, not {v[0]}.{v[1]}: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1" "setuptools>=77" wheel ninja pybind11 numpy
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,lint]"
	$(BIN)/python -c 'import robustft_kernels as r; print("backends:", {n: m or "ready" for n, m in r.backends().items()})'
	touch $@

demo: install
	$(BIN)/python -m examples.digits.run

# Some 90 minutes on two cores, and 100 MB of packages; it can be stopped, and goes on where it was.
experiment-emoji: install
	$(BIN)/python -m pip install --quiet --no-deps -r examples/emoji/requirements.txt
	$(BIN)/python -m examples.emoji.run $(ARGS)

experiment-linear: install
	$(BIN)/python -m examples.linear.run $(ARGS)

# Some 50 minutes on one core, and 90 MB of packages; it can be stopped, and goes on where it was.
experiment-sentiment: install
	$(BIN)/python -m pip install --quiet -r tests/integrations/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r examples/sentiment/requirements.txt
	$(BIN)/python -m examples.sentiment.run $(ARGS)

# A worker for each core.
PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal -p no:benchmark

# Fails if its CPU time would take two cores of the speed that tests/durations.py names over 12 minutes.
test: install lint
	$(PYTEST) -m "not (full or exhaustive)" --at-most 12 $(ARGS)

# What takes long: some 35 minutes of two such cores.
test-full: install
	$(PYTEST) -m full --at-most 45 $(ARGS)

# All kernels compiled, all rows and all faults in PTX: the other tiers take a sample of each. Some hour on two cores.
test-exhaustive: install
	$(PYTEST) -m exhaustive $(ARGS)

# Small faults, one at a time, in a copy of the sources: `make test` must catch each. Some 40 minutes on two cores.
test-mutants: install
	$(BIN)/python -m tests.mutants $(ARGS)

# The compiled GPU kernels, run on the CPU (tests/ptx). Some 40 minutes on two cores, with a C++ compiler.
test-ptx: install
	$(PYTEST) tests/test_ptx.py $(ARGS)

# timm asks for a torchvision, which would ask for a torch of its own; both stay in a folder that few commands see.
.cache/timm: | install
	$(BIN)/python -m pip install --quiet --no-deps --target $@ timm==1.0.31 torchvision==0.28.0

test-integrations: install .cache/timm
	$(BIN)/python -m pip install --quiet -r tests/integrations/requirements.txt
	PYTHONPATH=.cache/timm $(BIN)/python -m pytest -rs tests/integrations

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Each contest in three processes, see benchmarks/passes.py. Some 18 minutes on two idle cores, and before that 200 MB of
# packages to measure against (`make peers`); nothing else should run meanwhile.
BENCH = PYTHONPATH=.cache/timm $(HERE) -m benchmarks.passes

bench: install peers
	$(BENCH) results/bench.json $(ARGS)
	$(BIN)/python -m benchmarks.report results/bench.json --keep benchmarks/results/cpu.json --page docs/benchmarks.md \
		--quote README.md docs/costs.md

# DeepSpeed compiles its optimizer when it is first made.
peers: install .cache/timm
	$(BIN)/python -m pip install --quiet --no-build-isolation --group peers -r tests/integrations/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r examples/sentiment/requirements.txt
	-$(BIN)/python -c "import torch, deepspeed.ops.adam as d; d.DeepSpeedCPUAdam([torch.nn.Parameter(torch.ones(9))])"

bench-check: install
	$(BENCH) results/bench.json --against benchmarks/results/cpu.json -k "methods or precision or eager or fire" $(ARGS)

codegen: install
	$(BIN)/python -m benchmarks.codegen --write

# The pages as a site, in results/site. A link that leads nowhere is an error.
docs: install
	$(BIN)/python -m pip install --quiet --group docs
	$(BIN)/python -m mkdocs build --strict $(ARGS)

# These three install nothing, so they run on a machine without network: with .venv if it is there, else with $(PYTHON).
# They build the extension in place if it is not there, and the CUDA backend's kernels if there is nvcc. A machine
# without it takes the robustft_kernels/_sweeps.fatbin that another made of the same sources. Without a GPU they say so,
# and succeed.
HERE = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# The first run on a GPU: is it right, and how fast, backend by backend? In 9 minutes. ARGS="--device cpu" tries the
# program itself.
bringup:
	$(HERE) -m benchmarks.bringup $(ARGS)

test-gpu:
	$(HERE) -m benchmarks.bringup.build
	$(HERE) -m pytest --device cuda -rs tests/test_steps.py tests/test_precision.py $(wildcard tests/test_triton*.py) \
		tests/test_spread.py $(wildcard tests/test_gpu*.py) $(ARGS)

# What `bench` measures, on a GPU. Without what draws its page, steps and timings of `bringup` take its place.
bench-gpu:
	$(HERE) -m benchmarks.bringup.build
	@if $(HERE) -c "import pytest_benchmark, matplotlib"; then set -ex; \
		$(BENCH) results/bench-gpu.json --device cuda $(ARGS); \
		test ! -f results/bench-gpu.json || $(HERE) -m benchmarks.report results/bench-gpu.json \
			--keep $(RESULTS) --page docs/benchmarks-gpu.md; \
	else echo "pytest-benchmark and matplotlib are needed for docs/benchmarks-gpu.md; here are a few steps and timings"; \
		$(HERE) -m benchmarks.bringup --only smoke timings --out results/bench-gpu; fi

clean:
	rm -rf .venv build dist results .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info robustft_kernels/*.so \
		robustft_kernels/_sweeps.fatbin robustft_kernels/_built.json
