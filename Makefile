# make demo · make test · make bench · make lint: each makes its own .venv the first time.
# make gpu tests and measures on a GPU, with the Python that is there; make gpu DRY=1 tries it out without one.
# A GPU user overrides the pin: make demo TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The extension is checked by its own build tool, which does nothing where nothing changed.
BUILD := $(BIN)/python setup.py --quiet build_ext --inplace

# Containers often set it. The tests are many processes, and each would compile all that it imports: some 6 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test bench gpu lint format build clean

demo: build
	$(BIN)/pyvlm demo

test: build
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: build
	$(BIN)/python -m benchmarks

gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $(if $(DRY),--dry-run) $(if $(PARTS),--parts $(PARTS)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(OUT),--out $(OUT))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

build: $(STAMP)
	$(BUILD)

# --no-compile: Python compiles what is imported; pip would spend a minute on all of it.
$(STAMP): pyproject.toml setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; $$($(PYTHON) --version) was found: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile "$(TORCH)" "setuptools>=77" wheel ninja "pybind11>=2.13" numpy
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf build pyvlm/_C*.so
