# Everything runs in .venv, which the first target makes: torch first and pinned (a looser requirement may pull several
# GB of CUDA packages), then omniid with its development tools.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.omniid-installed
PYTEST_FLAGS ?=
# A test process for every logical CPU, up to eight, with one thread each; PYTEST_FLAGS="-n 0" runs all in one process.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Of `make train-mini`: records to train on, where checkpoints and weights go, hours for all stages together ("" means the preset's
# steps), and a file of `omniid export recogniser` ("" means none).
DATA ?= people
RUNS ?= runs/mini
WEIGHTS ?= weights/mini
HOURS ?=
RECOGNISER ?=

# Of `make gpu`: the benchmarks that a GPU decides and that need no photos or records.
GPU_BENCHMARKS := varlen_cross_attention masked_rows patch_l1 add_identity_attention layer_norm_modulate gelu_fp8 fp8_linear tower_attention

.PHONY: help venv demo test coverage lint bench gpu train-mini clean

help:
	@echo "make demo   the tour on a CPU: demo/contact_sheet.png and demo/metrics.json"
	@echo "make test   all tests that this machine can run"
	@echo "make coverage   which branches of kernels/ no test reaches without a GPU; fails unless there are none"
	@echo "make lint   ruff check and ruff format --check"
	@echo "make bench  timings of kernels and of the whole path, where their inputs are here"
	@echo "make gpu    on a CUDA device: its tests, the kernels' benchmarks, the train step and a step of FLUX.1-dev at the paper's size, with reports"
	@echo "make train-mini DATA=people HOURS=6 [RECOGNISER=mobilefacenet.pt2]   the mini weights, all stages; the same command goes on"
	@echo "make clean  remove what the targets made, .venv excepted"

venv: $(INSTALLED)

# Again when the metadata or the native sources change: an editable install sees every other change by itself.
$(INSTALLED): setup.py pyproject.toml CMakeLists.txt $(wildcard kernels/native/*.cpp kernels/native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "omniid needs Python 3.11 or newer, and $(PYTHON) is older; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -P -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet -e '.[dev,triton]'
	@touch $@

demo: venv
	$(BIN)/omniid demo -o demo

test: venv
	$(PYTEST) $(PYTEST_FLAGS)

# Without a GPU even where there is one: Triton's kernels then run in its interpreter, where their branches can be counted.
coverage: venv
	rm -f .coverage .coverage.*
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 0 $(PYTEST_FLAGS) tests/kernels
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: venv
	$(BIN)/omniid bench

gpu: venv
	@$(BIN)/python -P -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
		echo "make gpu needs a CUDA device and a CUDA build of torch in $(VENV); neither the tests nor the benchmarks ran" >&2; exit 1; }
	$(BIN)/pytest -m gpu $(PYTEST_FLAGS)
	$(BIN)/omniid bench $(GPU_BENCHMARKS) --save
	$(BIN)/omniid bench train_step -- --preset paper --device cuda --save
	$(BIN)/omniid bench generate_step -- --device cuda --fp8 --compile --save

train-mini: venv
	$(BIN)/python -P -m omniid.train.sequence --data $(DATA) --runs $(RUNS) --weights $(WEIGHTS) $(if $(HOURS),--hours $(HOURS)) $(if $(RECOGNISER),--recogniser $(RECOGNISER))

clean:
	rm -rf build demo runs *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* kernels/_native*.so
	rm -f $(INSTALLED)
	find cli kernels omniid tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
