# `make train` and `make test` set up all they need, in .venv, the first time and again when pyproject.toml or
# constraints.txt changes. PYTHON=... names the interpreter to make it with. ARGS=... is passed on to the command:
#
#     make train ARGS="--steps 200"
#     make test ARGS="-k rope -x"

PYTHON ?=
ARGS ?=
GOAL := $(firstword $(MAKECMDGOALS))
VENV = PYTHON='$(PYTHON)' GOAL='$(GOAL)' .ci/venv

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train test test-slow test-real test-oldest check format constraints clean
.PHONY: wheel bench-train bench-attention tune-attention bench-generate bench-gpu
.PHONY: docs docs-attention docs-zoo docs-site catalog

help: ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

train: .venv/.train ## train a language model on Shakespeare
	.venv/bin/zoo train shakespeare $(ARGS)

test: .venv/.test ## run the tests, minutes on a CPU
	.venv/bin/pytest -n 2 --dist loadfile $(ARGS)

test-slow: .venv/.test ## run the tests that take minutes each
	.venv/bin/pytest -m 'slow and not tpu and not gpu and not real' $(ARGS)

test-real: .venv/.test ## fetch pretrained weights (320 MB) into .real and run the tests that need them
	.venv/bin/python tests/zoo/formats/gguf/fetch.py .real
	.venv/bin/pytest -m 'real and not tpu and not gpu' $(ARGS)

test-oldest: .venv-oldest/.test ## run the tests with the oldest supported jax
	.venv-oldest/bin/pytest -n 2 --dist loadfile $(ARGS)

check: .venv/.test ## lint, format, types, spelling and the import rule, as in CI
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/basedpyright
	.venv/bin/codespell
	.venv/bin/lint-imports --no-logo

format: .venv/.test ## format the code and apply the linter's safe fixes
	.venv/bin/ruff check --fix-only
	.venv/bin/ruff format

wheel: .venv/.train ## build the wheel into dist/, install it into an empty environment, and train five steps with it
	.ci/wheel

bench-train: .venv/.train ## measure training speed
	.venv/bin/python benchmarks/train.py $(ARGS)

bench-attention: .venv/.bench ## measure attention: TPU by the compiler's schedule, masks, this CPU
	.venv/bin/python benchmarks/attention $(ARGS)

tune-attention: .venv/.test ## rank the block sizes of attention; on this machine with ARGS=--here
	.venv/bin/python benchmarks/attention tune $(ARGS)

bench-generate: .venv/.test .venv-torch/.torch ## measure generation beside transformers on PyTorch
	.venv/bin/python benchmarks/generate.py $(ARGS)

bench-gpu: .venv/.test ## measure training, generation and attention on a GPU (jax[cuda13], torch, transformers)
	.venv/bin/python benchmarks/gpu.py $(ARGS)

docs: .venv/.train ## train from scratch, and put the picture and the report into docs/
	.venv/bin/zoo train shakespeare --fresh --yes
	cp runs/shakespeare/loss.png docs/shakespeare.png
	sed 's/(loss.png)/(shakespeare.png)/' runs/shakespeare/report.md > docs/shakespeare.md

docs-attention: .venv/.train ## draw the masks of docs/attention.md
	.venv/bin/python docs/attention_pictures.py

docs-zoo: .venv/.train ## measure every family against its reference, and write the tables of docs/zoo.md
	.venv/bin/python docs/zoo_table.py

catalog: .venv/.train ## write configs/catalog.json, which `zoo list` prints
	.venv/bin/python -m flaxzoo.configs.catalog

docs-site: .venv-docs/.docs ## build the documentation as a site into build/site; broken links are errors
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build $(ARGS)

constraints: ## write constraints.txt from the newest versions
	rm -rf .venv-constraints
	$(VENV) .venv-constraints -e '.[viz,chat,gguf,quantized]' --group dev --group bench --group docs
	echo '# The environments of the tests and of the documentation: core, viz, dev, bench and docs, on Linux x86-64. Written by `make constraints`.' > $@.txt
	.venv-constraints/bin/python -m pip freeze --exclude-editable | tr 'A-Z_' 'a-z-' | sed 's/^\([^=]*\)\./\1-/' | LC_ALL=C sort -t= -k1,1 >> $@.txt
	rm -rf .venv-constraints

clean: ## remove the virtual environments and caches; runs/ stays
	rm -rf .venv .venv-oldest .venv-constraints .venv-torch .venv-docs build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

.venv/.train: pyproject.toml constraints.txt
	@$(VENV) .venv -e '.[viz,chat,gguf,quantized]' -c constraints.txt
	@touch $@

.venv/.test: pyproject.toml constraints.txt
	@$(VENV) .venv -e '.[viz,chat,gguf,quantized]' --group dev -c constraints.txt
	@touch .venv/.train $@

.venv/.bench: pyproject.toml constraints.txt
	@$(VENV) .venv -e '.[viz,chat,gguf,quantized]' --group dev --group bench -c constraints.txt
	@touch .venv/.train .venv/.test $@

.venv-oldest/.test: pyproject.toml
	@$(VENV) .venv-oldest -e '.[viz,chat,gguf,quantized]' --group dev jax==0.11.2 jaxlib==0.11.2
	@touch $@

.venv-docs/.docs: pyproject.toml constraints.txt
	@$(VENV) .venv-docs --group docs -c constraints.txt
	@touch $@

.venv-torch/.torch:
	@$(VENV) .venv-torch 'torch>=2.8' 'transformers>=5' safetensors
	@touch $@
