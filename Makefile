# `make demo` and `make test` are all there is to set up: each makes .venv, installs what the project pins, and runs.
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo
PROMPT := a large red ball with stripes moves left on a dark blue background
MINI := outputs/mini
MINI_RECIPES := text vae flow refine_dense refine_sparse refine_more vae_fine refine_short refine_whole \
  cfg_distill step_distill grpo
PROCESSES := 2

.PHONY: demo mini test lint check bench workflows clean

# On the miniature that comes with the package; LCV_MODEL would be another model's.
demo: .venv/installed
	rm -rf $(DEMO)
	env -u LCV_MODEL $(BIN)/lcv t2v -p "$(PROMPT)" --seed 1 --schedule distilled -o $(DEMO)/1-text.mp4
	env -u LCV_MODEL $(BIN)/lcv continue $(DEMO)/1-text.mp4 -p "$(PROMPT)" --seed 2 --schedule distilled -o $(DEMO)/2-continued.mp4
	env -u LCV_MODEL $(BIN)/lcv refine $(DEMO)/2-continued.mp4 -p "$(PROMPT)" --seed 3 -o $(DEMO)/3-refined.mp4
	@echo "made $(DEMO)/1-text.mp4, 2-continued.mp4 and 3-refined.mp4"

# The miniature from nothing, in two processes: hours on two cores. A stopped run goes on where it was.
mini: .venv/installed
	for recipe in $(MINI_RECIPES); do $(BIN)/lcv train mini/$$recipe --out $(MINI)/$$recipe --processes $(PROCESSES) || exit 1; done
	$(BIN)/python -m lcv_core.training.miniature $(MINI)

test: lint check

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd lcv_bsa && ../$(BIN)/ruff check . && ../$(BIN)/ruff format --check .
	$(BIN)/pyright

check: .venv/installed .comfyui/installed
	$(BIN)/python -m pytest

bench: .venv/installed
	$(BIN)/python benchmarks/core.py

.venv/installed: pyproject.toml lcv_bsa/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11 to 3.13 is needed, $(PYTHON) is another; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "this Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ./lcv_bsa -e '.[dev]'
	touch $@

# A ComfyUI and a browser for the tests; COMFYUI_DIR and CHROMIUM name others (see CONTRIBUTING.md).
.comfyui/installed: .venv/installed tests/comfyui/get_comfyui.py tests/comfyui/requirements.txt tests/ui/get_chromium.py
	$(BIN)/python tests/comfyui/get_comfyui.py
	$(BIN)/python tests/ui/get_chromium.py
	touch $@

# The shipped workflows, drawn anew in the real front end.
workflows: .venv/installed .comfyui/installed
	$(BIN)/python workflows/source/build.py

clean:
	rm -rf .venv .comfyui outputs/demo
