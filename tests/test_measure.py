"""Measuring: what is timed and what is not, memory of known arrays, and the dry run's estimate against XLA's own count."""

import itertools
import math
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import catalogue, measure, train
from attn_zoo.config import Measure
from attn_zoo.tasks import load_task
from tiny import make_cell


def test_compiling_is_timed_in_two_parts_and_gives_the_function():
    def slow_to_trace(x):
        time.sleep(0.1)
        return jnp.sin(x).sum()

    compiled, seconds = measure.compile_timed(jax.jit(slow_to_trace), jnp.arange(4.0))
    assert float(compiled(jnp.arange(4.0))) == pytest.approx(np.sin(np.arange(4.0)).sum())
    assert seconds["lower_s"] >= 0.1 and 0 < seconds["compile_s"] < 10


class Pending:
    """A result that takes 10 ms to arrive."""

    def block_until_ready(self):
        time.sleep(0.01)
        return self


def test_a_call_is_timed_until_its_result_is_there():
    speed = measure.time_calls(lambda: [Pending()], Measure(warmup=0, min_steps=5, min_seconds=0.0))
    assert speed["n"] == 5 and 0.01 <= speed["p20_s"] <= speed["median_s"] <= speed["p80_s"]


def test_calls_before_the_clock_starts_do_not_count():
    seconds = itertools.chain((0.1, 0.1), itertools.repeat(0.001))
    speed = measure.time_calls(lambda: time.sleep(next(seconds)), Measure(warmup=2, min_steps=3, min_seconds=0.0))
    assert speed["n"] == 3 and speed["p80_s"] < 0.05


def test_calls_go_on_until_there_are_enough_of_steps_and_of_seconds():
    calls = []
    speed = measure.time_calls(lambda: calls.append(time.sleep(0.01)), Measure(warmup=1, min_steps=2, min_seconds=0.1))
    assert len(calls) == 1 + speed["n"] and 2 < speed["n"] <= 10


def test_percentiles_are_those_of_the_calls(monkeypatch):
    clock = iter(np.cumsum([0, 1, 0, 3, 0, 2, 0, 5, 0, 4]).tolist())  # calls of 1, 3, 2, 5 and 4 s
    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    speed = measure.time_calls(lambda: None, Measure(warmup=0, min_steps=5, min_seconds=0.0))
    assert speed == {"median_s": 3.0, "p20_s": pytest.approx(1.8), "p80_s": pytest.approx(4.2), "n": 5}


@pytest.mark.parametrize("donated", [False, True])
def test_memory_of_known_arrays(donated):
    call = jax.jit(lambda x: x + 1.0, donate_argnums=(0,) if donated else ())
    memory = measure.memory(call.lower(jax.ShapeDtypeStruct((1000,), jnp.float32)).compile())
    assert (memory["argument_bytes"], memory["output_bytes"]) == (4000, 4000)
    assert memory["peak_bytes"] == (4000 if donated else 8000) + memory["temp_bytes"]
    assert memory["device_peak_bytes"] is None or memory["device_peak_bytes"] > 0


def test_the_matrix_product_rate_is_that_of_the_fastest_product(monkeypatch):
    start, products = [0.0], [(0.0, 10.0, 10.5), (0.1, 20.0, 20.25), (0.2, 30.0, 30.4)]  # each looked at, begun and ended
    clock = itertools.chain(start, *products, [0.3])
    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert measure.matmul_flops_per_s("float32") == 2 * 1024**3 / 0.25


def test_the_copy_rate_is_that_of_bytes_read_and_written(monkeypatch):
    start, copies = [0.0], [(0.0, 10.0, 10.5), (0.1, 20.0, 20.25)]
    clock = itertools.chain(start, *copies, [0.3])
    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert measure.copy_bytes_per_s() == 2 * 4 * 2**24 / 0.25


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_matrix_product_rate_is_one_of_this_world(dtype):
    assert 1e8 < measure.matmul_flops_per_s(dtype) < 1e16


@pytest.mark.parametrize("variant, remat", [("full", False), ("full", True), ("linear", False)])
def test_the_dry_runs_estimate_is_within_a_factor_of_three(variant, remat):
    task = "mqar(vocab=256)"
    cell = make_cell(variant, T=256, task=task, model={"D": 64, "layers": 2, "N": 4, "remat": remat}, tokens_per_step=2048)
    model = train.Model(cell, load_task(task, 256, ""))
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens, "weights": tokens.update(dtype=jnp.float32), "valid": tokens.update(dtype=jnp.bool_)}
    state = jax.eval_shape(lambda: train.fresh_state(model, cell))
    compiled = train.make_steps(model, cell.train, train.make_mesh(1)).train.lower(state, batch).compile()
    estimate = catalogue._estimate(cell, "")[3] * 2**20
    assert abs(math.log(estimate / measure.memory(compiled)["peak_bytes"])) < math.log(3)
