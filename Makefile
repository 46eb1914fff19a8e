# make demo   the whole pipeline at 1/1024 scale on this machine (under 8 minutes on 2 cores)
# make test   lint, then every CPU test (GPU tests skip without a GPU)
# make check  the same as make test, plus a check that the code is formatted
# make faults the fault campaign: kills, full disks, damaged files, hangs; benchmarks/results/faults.jsonl (under 20 minutes)
# All make their own .venv first. PYTHON picks the interpreter (3.11 or 3.12).
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo test check faults clean
demo: .venv/ready
	bash demo/run.sh

test: .venv/ready
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

check: .venv/ready
	$(BIN)/ruff format --check .
	$(MAKE) test

faults: .venv/ready
	$(BIN)/python benchmarks/fault_campaign.py

.venv/ready: requirements.txt requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo/out
