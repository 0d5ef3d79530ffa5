# `make demo` and `make test` set up everything they need: a virtual environment in .venv with requirements.txt.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?= vanilla_cnn resnet18 resnet34 resnet50 mobilenet_v2 efficientnet_b0
SEEDS ?= 5
RESULTS ?= out/results
DATA ?= data
DEMO := out/demo
PARALLEL := -n 2 --dist loadfile

.PHONY: demo test test-slow test-all lint reproduce tables install clean

demo: install  ## float training, calibration, QAT, export and one table, on a CPU in a minute or two
	rm -rf $(DEMO)
	$(BIN)/python train.py --m resnet18 --stem imagenet --dataset digits --num_epochs 6 --batch_size 64 --od $(DEMO) --en float
	$(BIN)/python train.py --m resnet18 --quantize --partial_ckpt --load_ckpt $(DEMO)/float/ckpt_best --num_epochs 2 --batch_size 64 \
		--od $(DEMO) --en qat
	$(BIN)/python infer.py --m resnet18 --load_ckpt $(DEMO)/qat/ckpt_best --FP32 --INT8PTC --INT8QAT \
		--record $(DEMO)/record.json --plot $(DEMO)/plot.png

test: install  ## the quick tests, at most four minutes on two cores
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu and not slow"

test-slow: install  ## the others that need no GPU
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not gpu"

test-all: test test-slow  ## all tests that need no GPU

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

reproduce: install  ## the study behind the results; with MODEL=resnet18 SEEDS=1 a few minutes on one GPU
	$(BIN)/python benchmarks/reproduce.py --m $(MODEL) --seeds $(SEEDS) --results $(RESULTS) --data_dir $(DATA) $(ARGS)

tables: install  ## write the tables and plots of README and docs again from results/
	$(BIN)/python benchmarks/tables.py

install: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
		{ echo 'error: needs Python 3.10 to 3.13: make PYTHON=python3.12 ...'; exit 1; }
	$(PYTHON) -m venv .venv
	@if $(BIN)/python -m pip install -q uv; then $(BIN)/uv pip install -q --python $(BIN)/python -r $<; \
		else $(BIN)/python -m pip install -q -r $<; fi
	touch $@

clean:
	rm -rf .venv out
