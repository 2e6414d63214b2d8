# Everything a contributor needs; each target builds what it uses. `make demo` and `make test` work from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find src python -name '*.rs' -o -name '*.py' -o -name '*.pyi') Cargo.toml Cargo.lock pyproject.toml

.PHONY: build demo test test-transformers check fix bench clean

build: $(VENV)/.wheel

# The libraries: named in pyproject.toml, as the extras of the package and the group of its developers.
$(VENV)/.libraries: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

# The package itself, as users get it: a wheel.
$(VENV)/.wheel: $(VENV)/.libraries $(SOURCES)
	rm -rf $(VENV)/dist
	$(BIN)/maturin build --release --locked --quiet --interpreter $(BIN)/python --out $(VENV)/dist
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall $(VENV)/dist/*.whl
	touch $@

demo: build
	$(BIN)/moda-attn demo --out .demo

test: build
	VIRTUAL_ENV=$(CURDIR)/$(VENV) cargo test --locked --features cuda
	cargo test --locked --features candle --test candle
	cargo test --locked --features candle --doc
	$(BIN)/python -m pytest -q

# Other releases of transformers, each in a thin environment over .venv: it holds only what that release wants otherwise.
RELEASES := 4.57.6 5.17.0
RELEASE_TESTS := $(addprefix tests/python/test_hf_,models.py structure.py patch.py generate.py decoding.py cache.py io.py record.py \
	peft.py trainer.py foreign.py) $(addprefix tests/python/test_balance_,families.py generation.py keys.py callback.py)

PURELIB := "import sysconfig; print(sysconfig.get_path('purelib'))"

$(VENV)-%/.ready: $(VENV)/.libraries
	rm -rf $(@D)
	$(PYTHON) -m venv --without-pip $(@D)
	$(BIN)/python -c $(PURELIB) > "$$($(@D)/bin/python -c $(PURELIB))/base.pth"
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet transformers==$*
	touch $@

# The release that the original LLaVA and Cambrian-1 code pins; its tokenizers has wheels up to Python 3.12.
LEGACY := 4.37.2

test-transformers: build $(RELEASES:%=$(VENV)-%/.ready) $(VENV)-$(LEGACY)/.ready
	for release in $(RELEASES); do $(VENV)-$$release/bin/python -m pytest -q -rs $(RELEASE_TESTS) || exit 1; done
	$(VENV)-$(LEGACY)/bin/python -m pytest -q -rs tests/python/test_legacy*.py tests/python/test_balance_legacy.py

check: build
	cargo fmt --check
	cargo clippy --locked --no-default-features -- -D warnings
	cargo clippy --locked --features candle,cuda --all-targets -- -D warnings
	cargo clippy --locked --features python,cuda -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --features candle,cuda --no-deps --quiet
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest moda_attn._native

fix:
	cargo fmt
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every row that has a goal, about ten minutes; `cargo bench` times the kernels one by one.
bench: build
	$(BIN)/moda-attn bench --record .bench

clean:
	rm -rf target $(VENV) $(VENV)-* .demo .bench
