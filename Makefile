# Needs Python >= 3.11 and make; everything else goes into .venv, at the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Through the environment, so that build requirements are pinned too (newer pips read the second name for those).
PIP_INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: serve test coverage check format bench bench-peers soak audit sbom site clean docs

serve: $(VENV)/.serve  ## Start the service on port 8000 with the embedded model.
	$(BIN)/deixis serve

test: $(VENV)/.test  ## Run the whole suite, in as many processes as there are cores, and four at most.
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

coverage: $(VENV)/.test  ## Run the whole suite, and tell which lines it does not reach; takes longer.
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

check: $(VENV)/.test  ## Formatting, lint, types, import layers, generated documentation, the site and its links.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	$(MAKE) --no-print-directory site

format: $(VENV)/.test  ## Rewrite files as `make check` wants them.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.bench  ## Measure the service against the encoder alone; some ten minutes, on an otherwise idle machine.
	$(BIN)/python -m benchmarks.service --output benchmarks/results

bench-peers: $(VENV)/.bench  ## Measure other servers beside it; makes their environments first, of several gigabytes each.
	$(BIN)/python -m benchmarks.peers --output benchmarks/results

soak: $(VENV)/.bench  ## Twenty minutes of mixed traffic with faults; fails if memory grows or an answer is not deserved.
	$(BIN)/python -m benchmarks.soak

audit: $(VENV)/.audit  ## Look every pinned package up in the Python package advisory database; asks its service.
	$(VENV)/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

sbom: $(VENV)/.serve $(VENV)/.audit  ## Write what is installed as a CycloneDX document, dist/sbom.json.
	@mkdir -p dist
	$(VENV)/audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file dist/sbom.json $(BIN)/python

site: $(VENV)/.test  ## Build the documentation as a site, site/; a link that leads nowhere is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site

docs: $(VENV)/.test  ## Rewrite what is generated: docs/openapi.json and the tables of docs/.
	$(BIN)/python docs/generate.py

clean:  ## Remove the virtual environment and every cache.
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Deixis needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# A stamp per set of packages: made again when what it installs may have changed.
$(VENV)/.serve: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo 'Installing into $(VENV); the first time takes some minutes, most of them for torch.'
	$(PIP_INSTALL) --editable '.[server,captions,embedded,heif,openvino]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo 'Installing into $(VENV); the first time takes some minutes, most of them for torch.'
	$(PIP_INSTALL) --editable '.[server,captions,embedded,heif,openvino,postgres,ray,test,check,docs]'
	@touch $@ $(VENV)/.serve

# In an environment of its own, so that the tools are not among what they look at.
$(VENV)/.audit: $(VENV)/bin/python constraints.txt
	$(BIN)/python -m venv $(VENV)/audit
	PIP_CONSTRAINT=constraints.txt $(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit cyclonedx-bom
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP_INSTALL) --editable '.[bench]'
	@touch $@
