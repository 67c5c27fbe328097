# make quickstart   install, train a GPT on Python's own library, print samples
# make test         install, check the style, run all tests; needs no GPU and, once installed, no network
# make proofs       what takes longer: more variants of the tests, and every kernel compiled for every architecture
# make lint-kernels TRITON=3.6.0   compile every kernel under that release of Triton and read the machine code
# make gpu-check OUT=results PEER=liger=FOLDER   on a GPU, with PYTHON as it is: check the kernels, then measure them
# PYTHON=python3.12 picks the interpreter of .venv

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
INSTALLED := .venv/.installed
TESTS_INSTALLED := .venv/.tests-installed
PROOFS_INSTALLED := .venv/.proofs-installed

.PHONY: quickstart test proofs lint lint-kernels gpu-check clean

quickstart: $(INSTALLED)
	@$(BIN)/python train.py configs/quickstart.toml --resume
	@$(BIN)/python sample.py runs/quickstart --prompt "    def __init__(self, name" --num-samples 3 \
		--temperature 0.75 --top-p 0.9 --repetition-penalty 1.1

test: $(TESTS_INSTALLED) lint
	$(BIN)/python -m pytest -q -n 2 -m "not serial and not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 -m "not slow" tests/kernels
	$(BIN)/python -m kernels.lint --arch sm_90 --case "bfloat16 64" "bfloat16 128" layer_norm/1024 rms_norm/8192 \
		rotary/64 "heads/64 norm," "1 x " gelu/tanh swiglu squared_relu "50304 all"
	$(BIN)/python -m pytest -q -m "serial and not slow"

proofs: $(PROOFS_INSTALLED)
	$(BIN)/python -m pytest -q -n 2 -m "slow and not serial"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 -m slow tests/kernels
	$(BIN)/python -m pytest -q -m "slow and serial"
	$(BIN)/python -m kernels.lint

lint: $(TESTS_INSTALLED)
	$(BIN)/ruff check .

TRITON ?= 3.6.0
OTHER_TRITON = .venv/triton-$(TRITON)

lint-kernels: $(OTHER_TRITON)/.installed
	PYTHONPATH=$(OTHER_TRITON) $(BIN)/python -m kernels.lint

$(OTHER_TRITON)/.installed: | $(INSTALLED)
	rm -rf $(OTHER_TRITON)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OTHER_TRITON) triton==$(TRITON)
	@touch $@

# torch is installed first and pinned, so that no dependency of another package picks its release
$(INSTALLED): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(TESTS_INSTALLED): $(INSTALLED)
	$(PIP) --editable ".[test,dev]"
	@touch $@

$(PROOFS_INSTALLED): $(TESTS_INSTALLED)
	$(PIP) --editable ".[eval]"
	@touch $@

OUT ?= benchmarks/results/
PEER ?=

gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --out $(OUT) $(addprefix --peer ,$(PEER))

clean:
	rm -rf .venv runs build *.egg-info
