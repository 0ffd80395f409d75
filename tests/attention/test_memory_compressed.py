"""Memory-compressed attention: the convolution and its slots against NumPy, and which positions reach which query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import UserError, make_attention
from attn_zoo.attention.memory_compressed import Options, PastSlots, compress, num_slots
from attn_zoo.ops.block_mask import block_mask, count_pairs

N, K, H = 4, 2, 8


def make(options="", causal=False):
    return make_attention(f"memory_compressed({options})", num_heads=N, num_kv_heads=K, head_dim=H, max_len=40, causal=causal, rngs=nnx.Rngs(0))


def inputs(T, S):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, T, N, H), (2, S, K, H), (2, S, K, H))]


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("stride, kernel, first", [(3, 3, True), (2, 5, False)])
def test_formula(stride, kernel, first, causal):
    """Slot by slot in float64, with invalid positions as zeros; 13 positions end within a slot."""
    attention, (q, k, v) = make(f"stride={stride}, kernel={kernel}, first={first}", causal), inputs(17, 13)
    valid = np.random.default_rng(1).random((2, 13)) > 0.4
    valid[0, 6:11] = False  # slots that hold nothing
    o = jax.jit(attention)(q, k, v, valid_BS=jnp.asarray(valid))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    key_kernel, value_kernel = (np.asarray(x[...], np.float64) for x in (attention.key_kernel, attention.value_kernel))
    for b, t, n in np.ndindex(2, 17, N):
        h, keys, values = n // 2, [], []
        if causal and first and valid[b, 0]:
            keys, values = [k[b, 0, h]], [v[b, 0, h]]
        for start in range(0, 13 if kernel == stride else 13 - kernel + stride, stride):
            field = [(p, start + p) for p in range(kernel) if start + p < 13 and valid[b, start + p]]
            if field and (start + kernel - 1 <= t or not causal):
                keys.append(sum(k[b, j, h] @ key_kernel[p, h] for p, j in field))
                values.append(sum(v[b, j, h] @ value_kernel[p, h] for p, j in field))
        expected = np.zeros(H)
        if keys:
            weights = np.exp(np.array(keys) @ q[b, t, n] / np.sqrt(H))
            expected = weights / weights.sum() @ np.array(values)
        np.testing.assert_allclose(o[b, t, n], expected, atol=3e-6)


@pytest.mark.parametrize("S, slots", [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_slots_cover_every_position(S, slots):
    assert num_slots(Options(), S) == slots
    gradient = jax.grad(lambda x: compress(x, make().value_kernel[...], Options()).sum())(jnp.ones((1, S, K, H)))
    assert (gradient != 0).all()


def test_which_positions_a_causal_query_depends_on():
    """Position 0, and all whole slots so far: nothing of the slot that is still being filled."""
    attention, (q, k, v) = make(causal=True), inputs(10, 10)
    jacobian = jax.jit(jax.jacrev(lambda v: attention(q, k, v)[0, :, 0].sum(-1)))(v)[:, 0, :, 0]
    reached = np.asarray(abs(jacobian).sum(-1) > 0)
    expected = [[j == 0 or j < (i + 1) // 3 * 3 for j in range(10)] for i in range(10)]
    np.testing.assert_array_equal(reached, expected)


def test_mean_slots_are_means():
    attention, (q, k, v) = make("init='mean'"), inputs(4, 9)
    o = jax.jit(attention)(jnp.zeros_like(q), k, v)
    np.testing.assert_allclose(o, jnp.broadcast_to(jnp.repeat(v.mean(1, keepdims=True), 2, axis=2), o.shape), atol=1e-6)


def test_slots_keep_the_scale_of_what_they_read():
    slots = compress(jax.random.normal(jax.random.key(1), (2, 3000, K, H)), make().key_kernel[...], Options())
    assert slots.shape == (2, 1000, K, H) and float(slots.std()) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("pattern", [PastSlots(3, 3, True), PastSlots(2, 5, False), PastSlots(1, 1, False)])
def test_blocks_of_the_pattern_are_exact(pattern):
    i, j = np.arange(40)[:, None], np.arange(17)[None]
    seen = pattern.mask(i, j)
    assert count_pairs(pattern, 40, 17) == seen.sum() > 0
    mask = block_mask(pattern, 40, 17, 4, 4)
    for c in range(10):
        rows = seen[4 * c : 4 * c + 4]
        some = [J for J in range(5) if rows[:, 4 * J : 4 * J + 4].any()]
        full = [J for J in range(4) if rows[:, 4 * J : 4 * J + 4].all()]
        assert mask.full_block[mask.full_start[c] : mask.full_start[c + 1]].tolist() == full
        assert mask.part_block[mask.part_start[c] : mask.part_start[c + 1]].tolist() == [J for J in some if J not in full]


def test_a_kernel_shorter_than_the_stride_is_an_error():
    with pytest.raises(UserError, match="kernel=3: must be at least stride=4"):
        make("stride=4")
