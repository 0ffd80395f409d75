# `make sweep` and `make test` do all the set-up themselves: a virtual environment from a hashed lock, redone only when the lock changes.
ACCELERATOR ?= cpu
PYTHON ?= python3
LOCK := locks/$(ACCELERATOR).txt
READY := .venv/.ready-$(ACCELERATOR)
PEERS_READY := .venv-peers/.ready
CUDA_READY := .venv-cuda/.ready
CHECK_PYTHON = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attn_zoo needs Python 3.11 or later; this is " + sys.version.split()[0] + ". Try: make venv PYTHON=python3.11")'

.PHONY: sweep test test-newest test-peers test-cuda bench bench-gpu venv locks

sweep: $(READY)
	.venv/bin/python launch.py --config=experiments/seq_len.py --workdir=results/seq_len

test: $(READY)
	.venv/bin/python -m pytest -n 2

# The same with the newest versions there are, in place of the locked ones; those of jax from 0.11 on need a later Python (PYTHON=python3.12).
test-newest:
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --editable '.[test]'
	.venv-newest/bin/python -m pytest -n 2

# Agreement with the PyTorch packages of others, on the CPU; without them `make test` skips these tests.
test-peers: $(PEERS_READY)
	.venv-peers/bin/python -m pytest tests/peers

# Compiling for NVIDIA GPUs, on a machine that has none; without JAX's CUDA plugin `make test` skips these tests.
test-cuda: $(CUDA_READY)
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m pytest -n 2 tests/ahead

# Attention alone beside the PyTorch packages of others, in one run.
bench: $(PEERS_READY)
	.venv-peers/bin/python experiments/core_bench.py --peers=all --seq_lens=1024,2048,4096

# The same on an NVIDIA GPU, for head dims of 64 and 128 (make bench-gpu ACCELERATOR=cuda13); compiles nothing further after three and a half minutes of each.
# Peers that cannot be installed become rows with the reason.
BLOCKED := full, local, global_window, block, block(global_blocks=2, random_blocks=3), block_local, dilated, strided, fixed, axial, linear, performer, rfa, retention, delta
GPU := --dtype=bfloat16 --tokens=32768 --N=16 --seq_lens=4096,32768,8192,16384 --variants='$(BLOCKED)' \
  --rounds=5 --jobs=12 --minutes=3.5 --peers=all --peers_python=.venv-peers/bin/python --peer_processes=6
bench-gpu: $(PEERS_READY) $(READY)
	@case '$(ACCELERATOR)' in cuda*) ;; *) echo 'make bench-gpu ACCELERATOR=cuda13 (or cuda12): $(ACCELERATOR) is no GPU' >&2; exit 2 ;; esac
	-.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[tokamax]'
	-.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[peers,peers_gpu]'
	-JAX_PLATFORMS=cuda .venv/bin/python experiments/core_bench.py $(GPU) --H=64 --out=results/core_bench_gpu_64
	JAX_PLATFORMS=cuda .venv/bin/python experiments/core_bench.py $(GPU) --H=128 --out=results/core_bench_gpu_128

venv: $(READY)

$(READY): $(LOCK) setup.cfg pyproject.toml
	$(CHECK_PYTHON)
	rm -f .venv/.ready-*
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(LOCK)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(PEERS_READY): locks/cpu.txt setup.cfg pyproject.toml
	$(CHECK_PYTHON)
	rm -f $@
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r locks/cpu.txt
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[peers]'
	touch $@

$(CUDA_READY): locks/cuda13.txt setup.cfg pyproject.toml
	$(CHECK_PYTHON)
	rm -f $@
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r locks/cuda13.txt
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Renew the locks (needs uv: https://docs.astral.sh/uv).
locks:
	for a in cpu cuda12 cuda13 tpu; do \
	  uv pip compile setup.cfg --quiet --universal --fork-strategy fewest --python-version 3.11 --generate-hashes --no-annotate --no-header \
	    --extra test $$(test $$a = cpu || echo --extra $$a) --output-file locks/$$a.txt || exit 1; \
	done
