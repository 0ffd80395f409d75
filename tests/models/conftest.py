import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attn_zoo import config
from attn_zoo.attention import VARIANTS, Attention, parse_variant
from attn_zoo.attention.base import Loss, Statistic, softmax_reference
from attn_zoo.models import Transformer


@pytest.fixture(autouse=True)
def quick_compilation():
    """These models are tiny and their compilations many: XLA need not optimize them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Count(nnx.Variable):
    """State that is updated and not trained."""


class Probe(Attention):
    """Full attention with a learned temperature, that leaves behind all that a layer may: a loss of its own, which has
    gradients, statistics, and updated state; some as variables it was built with, some as new ones."""

    def __init__(self, options, dims, *, shared, rngs):
        super().__init__(options, dims)
        self.temperature = nnx.Param(jnp.full((dims.num_heads,), 1.5))
        self.calls = Count(jnp.zeros((), jnp.int32))
        self.size = Loss(jnp.zeros(()))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        q_BTNH = q_BTNH * self.temperature[:, None].astype(q_BTNH.dtype)
        T, S = q_BTNH.shape[1], k_BSKH.shape[1]
        mask = jnp.tri(T, S, dtype=bool) if self.dims.causal else jnp.ones((T, S), bool)
        self.calls[...] = self.calls[...] + 1
        self.size[...] = jnp.square(q_BTNH.astype(jnp.float32)).mean()
        self.spread = Statistic(k_BSKH.astype(jnp.float32).std())
        self.draw = Statistic(jnp.full((), -1.0) if key is None else jax.random.uniform(key))
        self.query_dtype = str(q_BTNH.dtype)
        return softmax_reference(q_BTNH, k_BSKH, v_BSKH, mask if valid_BS is None else mask & valid_BS[:, None, None, :])


@pytest.fixture
def probe(monkeypatch):
    """Registers Probe as the variant 'probe' for the length of a test."""
    monkeypatch.setitem(VARIANTS, "probe", dataclasses.replace(VARIANTS["full"], name="probe", build=Probe))
    return Probe


@pytest.fixture
def build(probe):
    """A tiny Transformer; keywords are the Transformer's own or fields of config.Model."""

    def build(variant="probe", *, inputs_vocab=11, num_outputs=10, max_len=12, causal=False, per_token=True, seed=0, **fields):
        return Transformer(
            config.Model(**({"D": 8, "layers": 2, "N": 2} | fields)),
            variant=parse_variant(variant),
            attention=config.Attention(),
            inputs_vocab=inputs_vocab,
            num_outputs=num_outputs,
            max_len=max_len,
            causal=causal,
            per_token=per_token,
            rngs=nnx.Rngs(seed),
        )

    return build


@pytest.fixture
def tokens():
    """Random tokens [B, T] below 10."""
    return lambda B, T, seed=0: jax.random.randint(jax.random.key(seed), (B, T), 0, 10)
