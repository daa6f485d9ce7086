# One command per habit, the same for people and for CI.
VENV    ?= .venv
PYTHON  ?= python3
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
TRL     := .bench/trl
LLAMA   := .bench/llama
VLLM    := .bench/vllm

.PHONY: demo test test-clients test-vllm notebooks check format bench bench-environment soak protos clean

demo: $(STAMP)            ## the tutorial, end to end, on real weights
	$(BIN)/tunesmith demo

test: $(STAMP)            ## the whole test suite
	$(BIN)/pytest -n 2 --dist loadfile

test-clients: $(STAMP)    ## drive every client; CHECK=1 fails when docs/compatibility.md is stale
	$(BIN)/python tests/clients/run.py $(if $(CHECK),--check)

test-vllm: $(STAMP) $(VLLM)/.installed  ## the vLLM engine on a real vLLM server, whose answers are kept for `make test`
	$(BIN)/python tests/vllm/run.py $(VLLM)/bin/python

notebooks: $(STAMP)       ## run the notebooks of examples/ from clean kernels and keep their outputs
	$(BIN)/python tests/clients/notebooks.py $(if $(CHECK),--check)

check: $(STAMP)           ## lint, format, types, and what is known to be unsafe; ADVISORIES=FILE for a newer safety-db
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive src
	$(BIN)/python scripts/audit.py $(if $(ADVISORIES),--database $(ADVISORIES))

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# OPTIONS=--quick is for both; other options of training.py in OPTIONS, of serving.py in SERVING.
bench: $(STAMP) bench-environment  ## training beside TRL, serving beside llama.cpp and others, requests a second
	$(BIN)/python benchmarks/training.py $(OPTIONS)
	$(BIN)/python benchmarks/serving.py $(filter --quick,$(OPTIONS)) $(SERVING)
	$(BIN)/python benchmarks/api.py

# A peer that cannot be installed here is left out of the benchmark, which says so.
bench-environment: $(TRL)/.installed  ## the environments of TRL, llama.cpp (built here: minutes) and vLLM (3.4 GB)
	-$(MAKE) $(LLAMA)/.installed
	-$(MAKE) $(VLLM)/.installed

soak: $(STAMP)            ## 50 jobs with random kills on a tiny model; OPTIONS="--jobs N --seed N --kills N"
	$(BIN)/python benchmarks/soak.py $(OPTIONS)

protos: $(STAMP)          ## compile the official protos again (needs npm)
	$(BIN)/python scripts/protos.py

clean:
	rm -rf $(VENV) .proto-build

# torch comes first and by its exact version: a bare or ranged torch takes a CUDA build of several GB.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[dev]'
	@touch $@

$(TRL)/.installed: benchmarks/pins/trl.txt
	rm -rf $(TRL)
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/pip install --quiet -c $< "$$(grep '^torch==' $<)"
	$(TRL)/bin/pip install --quiet -r $<
	@touch $@

$(LLAMA)/.installed: benchmarks/pins/llama.txt | $(STAMP)
	rm -rf $(LLAMA)
	$(PYTHON) -m venv $(LLAMA)
	grep -v '^llama_cpp_python' $< | $(LLAMA)/bin/pip install --quiet -r /dev/stdin
	$(BIN)/python benchmarks/serving_build.py $(LLAMA) $<
	@touch $@

# Without dependencies: those that it names and that text needs are pinned, those for pictures and sound are not.
$(VLLM)/.installed: benchmarks/pins/vllm.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet -c $< "$$(grep '^torch==' $<)"
	$(VLLM)/bin/pip install --quiet --no-deps -r $<
	@touch $@
