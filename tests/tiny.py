"""What the tests of training, cells and sweeps share: a task that costs nothing, cells of a few seconds, and a user's environment."""

import os

import numpy as np

from attn_zoo.config import Attention, Cell, Measure, Model, Train
from attn_zoo.ops.native import library
from attn_zoo.tasks import Task

# A process that a test starts sees one device, as a user's does: the four of conftest.py are for the tests' own process.
# It compiles without LLVM's optimizations, in half the time.
ENV = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}

ON_CPU = "xla" if isinstance(library(), str) else "native"  # what 'auto' runs patterns and scans on: the native kernels where there is a C++ compiler

MQAR = "mqar(vocab=16, pairs=2, train_examples=64, validation_examples=8, test_examples=1)"  # prepared in a moment


def make_cell(variant="full", *, T=16, seed=0, task=MQAR, model={}, measure={}, **train) -> Cell:
    """A cell of one layer of 16, with 4 sequences a step at T = 16, that times nothing."""
    return Cell(
        variant,
        T,
        seed,
        task,
        Model(**({"D": 16, "layers": 1, "N": 2} | model)),
        Attention(),
        Train(**({"steps": 30, "tokens_per_step": 64, "lr": 2e-2, "warmup": 0, "log_every": 1, "eval_tokens": 16 * 6} | train)),
        Measure(**({"modes": (), "warmup": 0, "min_steps": 2, "min_seconds": 0.0} | measure)),
    )


class Staircase(Task):
    """Sequences that climb by 3, modulo 8, in memory; each example has more or fewer scored targets than its neighbours."""

    name = "staircase"
    causal = True
    per_token = True
    inputs_vocab = num_outputs = 8

    def __init__(self, seq_len: int):
        super().__init__(None, seq_len, "")

    def train_source(self):
        return range(64)

    def train_example(self, record, rng):
        return self.example(record)

    def eval_examples(self, tokens, split):
        return (self.example(100 + i) for i in range(max(1, tokens // self.seq_len)))

    def example(self, i: int):
        T = self.seq_len
        tokens = ((i + 3 * np.arange(T + 1)) % 8).astype(np.int32)
        weights = (np.arange(T) >= (5 * i) % T).astype(np.float32)
        return {"inputs": tokens[:-1], "targets": tokens[1:], "weights": weights, "valid": np.ones(T, bool)}

    def floors(self):
        return {}

    def provenance(self):
        return {}
