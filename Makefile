# make up: a cluster on this machine, mounted on ./mnt.  make test: everything that is tested.
.PHONY: setup up down test check clean

MOUNT := mnt
RAFTFS := .venv/bin/raftfs

setup:
	@deploy/setup.sh

up: setup
	@$(RAFTFS) cluster up --mount $(MOUNT)
	@echo
	@echo "raftfs is mounted on ./$(MOUNT). Try:"
	@echo "  head -c 100M /dev/urandom > $(MOUNT)/big"
	@echo "  .venv/bin/mfsfileinfo $(MOUNT)/big          # its chunks and their copies"
	@echo "  .venv/bin/mfssetgoal 3 $(MOUNT)/big         # three copies of each"
	@echo "  .venv/bin/raftfs cluster kill leader    # and go on writing"
	@echo "  .venv/bin/raftfs status                 # who leads now"
	@echo "  make down"

down:
	@if [ -x $(RAFTFS) ]; then $(RAFTFS) cluster down; else echo "nothing is installed, so nothing runs"; fi

check: setup
	@echo "== style and types"
	@.venv/bin/ruff check .
	@.venv/bin/mypy

test: check
	@for part in test_tidy.py unit model sim chunk cli linear scenario chaos; do \
		[ -n "$$(find tests/$$part -name 'test_*.py' 2>/dev/null)" ] || continue; \
		echo "== tests/$$part"; \
		.venv/bin/python -m pytest -q tests/$$part || exit 1; \
	done

clean: down
	rm -rf .venv .raftfs build *.egg-info
