"""A mixture is its parts, each on its own heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import Unsupported, UserError, make_attention
from attn_zoo.attention import parse_variant, variant_text

T, N, H = 40, 8, 8


def make(spec, N=N, K=None, causal=True, **kwargs):
    return make_attention(spec, num_heads=N, num_kv_heads=K, head_dim=H, max_len=512, causal=causal, rngs=nnx.Rngs(0), **kwargs)


def inputs(K=N, T=T):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, T, heads, H)) for key, heads in zip(keys, (N, K, K))]


@pytest.mark.parametrize("K", [8, 4, 1])
def test_each_part_attends_with_its_heads(K):
    q, k, v = inputs(K)
    found = make("mix(local(window=3)*5, linear*2, full)", K=K)(q, k, v)
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    parts = ("local(window=3)", slice(0, 5)), ("linear", slice(5, 7)), ("full", slice(7, 8))
    expected = [make(spec, N=s.stop - s.start)(q[:, :, s], k[:, :, s], v[:, :, s]) for spec, s in parts]
    np.testing.assert_allclose(found, jnp.concatenate(expected, axis=2), atol=2e-6)


def test_counts_are_shares():
    assert [part.dims.num_heads for part in make("mix(local*3, full)").parts] == [6, 2]
    assert [part.dims.num_heads for part in make("mix(full, local, linear*2)", N=4).parts] == [1, 1, 2]
    with pytest.raises(UserError, match="parts='local': shares of 3 must divide num_heads=8 into whole heads; the counts .* adding up to 8"):
        make("mix(local, full*2)")


def test_keys_stay_grouped_where_groups_are_whole():
    assert [part.dims.num_kv_heads for part in make("mix(local*4, full*4)", K=2).parts] == [1, 1]
    assert [part.dims.num_kv_heads for part in make("mix(local*6, full*2)", K=2).parts] == [6, 2]


def test_what_one_part_cannot_do_the_mixture_cannot():
    with pytest.raises(Unsupported, match="linformer cannot be causal"):
        make("mix(linformer(rank=4), full)")


def test_losses_state_and_work_are_those_of_the_parts():
    mixed, alone = make("mix(adaptive_span(init=8, max_span=256)*2, full*6)"), make("adaptive_span(init=8, max_span=256)", N=2)
    assert mixed.flops(2, T, T) == alone.flops(2, T, T) + make("full", N=6).flops(2, T, T)
    mixed.parts[0].ratio[...] = jnp.ones(2)
    mixed.specialize()
    assert mixed.parts[0].window > alone.window
    mixed(*inputs())
    assert float(mixed.parts[0].penalty[...]) == pytest.approx(mixed.parts[0].options.penalty * 256)
    assert [part["part"] for part in mixed.plan(T, T)["parts"]] == ["adaptive_span(max_span=256, init=8)*2", "full*6"]


def test_its_text_is_canonical():
    assert variant_text(parse_variant("mix(2*local(window=256), full*2, mix(full))")) == "mix(local*2, full*2, mix(full))"
