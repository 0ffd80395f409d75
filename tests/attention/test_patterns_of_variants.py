"""Which pairs each variant sees, from outside: with equal scores and one-hot values, an output is the weight of every key.

The definitions are written here once more, pair by pair, and share nothing with the variants.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import make_attention

N, H = 2, 48  # two heads, and more channels than keys
SHAPES = {"T41": (41, 41), "T29-S43": (29, 43), "T43-S29": (43, 29)}
DIRECTION = {False: "bidirectional", True: "causal"}


def make(spec, causal, max_len=48):
    return make_attention(spec, num_heads=N, head_dim=H, max_len=max_len, causal=causal)


def weights_of(attention, T, S, run="__call__"):
    """The weight of key j in output i, [N, T, S], when all scores are equal."""
    q, k = jnp.zeros((1, T, N, H)), jnp.zeros((1, S, N, H))
    v = jnp.broadcast_to(jnp.eye(S, H)[None, :, None], (1, S, N, H))
    return np.moveaxis(np.asarray(getattr(attention, run)(q, k, v))[0, :, :, :S], 1, 0)


def table(sees, T, S):
    return np.array([[float(sees(i, j)) for j in range(S)] for i in range(T)])


def normalized(weights):
    """Every row over its sum; rows that see nothing stay zero."""
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def assert_sees(attention, expected, T, S, B=3):
    """The weights of all heads are `expected`, normalized, zero exactly where it is; and the useful FLOPs count its pairs."""
    weights = weights_of(attention, T, S)
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(expected > 0, weights.shape))
    np.testing.assert_allclose(weights, np.broadcast_to(normalized(expected), weights.shape), rtol=1e-5, atol=1e-7)
    pairs = np.broadcast_to(expected > 0, (N, T, S)).sum()
    assert attention.flops(B, T, S) == 4 * B * H * pairs


FIXED = {  # spec -> whether i sees j, before causality
    "full": lambda i, j: True,
    "local(window=0)": lambda i, j: abs(i - j) <= 0,
    "local(window=7)": lambda i, j: abs(i - j) <= 7,
    "strided(stride=1)": lambda i, j: True,
    "strided(stride=6)": lambda i, j: abs(i - j) < 6 or (i - j) % 6 == 0,
    "strided(stride=45)": lambda i, j: abs(i - j) < 45 or (i - j) % 45 == 0,
    "block(block=5, window_blocks=0, global_blocks=0, random_blocks=0)": lambda i, j: i // 5 == j // 5,
    "block(block=5, window_blocks=1, global_blocks=0, random_blocks=0)": lambda i, j: abs(i // 5 - j // 5) <= 1,
    "block(block=4, window_blocks=0, global_blocks=2, random_blocks=0)": lambda i, j: i // 4 == j // 4 or i // 4 < 2 or j // 4 < 2,
    "block(block=7, window_blocks=1, global_blocks=1, random_blocks=0)": lambda i, j: abs(i // 7 - j // 7) <= 1 or i // 7 < 1 or j // 7 < 1,
    "block(block=64, window_blocks=0, global_blocks=0, random_blocks=3)": lambda i, j: True,  # one block is all there is
}


@pytest.mark.parametrize("causal", DIRECTION, ids=DIRECTION.values())
@pytest.mark.parametrize("spec", FIXED)
def test_sees_exactly_its_pairs(spec, causal):
    T, S = list(SHAPES.values())[(list(FIXED).index(spec) + causal) % len(SHAPES)]  # every shape in turn
    expected = table(lambda i, j: FIXED[spec](i, j) and (j <= i or not causal), T, S)
    assert_sees(make(spec, causal), expected, T, S)


def test_the_default_stride_is_that_of_max_len():
    """The square root of the length it was built for, whatever the length it is called at; its FLOPs too."""
    expected = table(lambda i, j: abs(i - j) < 10 or (i - j) % 10 == 0, 41, 41)
    assert_sees(make("strided", False, max_len=100), expected, 41, 41)


def soft(T, S, z, ramp, causal):
    return table(lambda i, j: min(max((ramp + z - abs(i - j)) / ramp, 0), 1) if j <= i or not causal else 0, T, S)


@pytest.mark.parametrize("causal", DIRECTION, ids=DIRECTION.values())
@pytest.mark.parametrize("z, ramp, max_span", [(0, 1, 8), (4, 8, 16), (9.5, 3, 40)])
def test_adaptive_span_weighs_by_distance(z, ramp, max_span, causal):
    T, S = SHAPES["T29-S43" if causal else "T43-S29"]
    attention = make(f"adaptive_span(max_span={max_span}, ramp={ramp}, init={z})", causal)
    assert_sees(attention, soft(T, S, z, ramp, causal), T, S)


def test_adaptive_span_has_a_span_for_every_head():
    attention = make("adaptive_span(max_span=40, ramp=3, init=4)", True)
    attention.ratio[...] = jnp.array([2.5, 30.0]) / 40
    attention.specialize()
    assert_sees(attention, np.stack([soft(41, 41, z, 3, True) for z in (2.5, 30.0)]), 41, 41)


# The random part of block-sparse attention. Blocks of 4, so that 41 and 43 positions end in a cut block.
BLOCK = 4


def blocks_seen(spec, T, S, causal, run="__call__"):
    """{I: the set of J whose every pair is seen}; fails where a block is seen in part."""
    weights = weights_of(make(spec, causal), T, S, run)
    assert (weights[0] == weights[1]).all(), "one draw for all heads"
    seen, rows = weights[0] > 0, {}
    for I in range(-(-T // BLOCK)):
        rows[I] = set()
        for J in range(-(-S // BLOCK)):
            i, j = np.arange(I * BLOCK, min(I * BLOCK + BLOCK, T))[:, None], np.arange(J * BLOCK, min(J * BLOCK + BLOCK, S))[None, :]
            visible = np.broadcast_to(j <= i, (i.size, j.size)) if causal else np.ones((i.size, j.size), bool)
            assert not seen[i, j][~visible].any()
            assert seen[i, j][visible].all() or not seen[i, j].any()
            if visible.any() and seen[i, j].any():
                rows[I].add(J)
    return rows


def drawn(rows, window, global_blocks, S, causal):
    """{I: (blocks seen beyond window and global ones, blocks that could be drawn)}."""
    beyond = {}
    for I, seen in rows.items():
        candidates = {J for J in range(-(-S // BLOCK)) if J < I or not causal}
        fixed = {J for J in range(-(-S // BLOCK)) if abs(I - J) <= window or I < global_blocks or J < global_blocks}
        fixed = {J for J in fixed if J <= I or not causal}
        assert fixed <= seen
        beyond[I] = seen - fixed, candidates - fixed
    return beyond


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", DIRECTION, ids=DIRECTION.values())
@pytest.mark.parametrize("window, global_blocks, random_blocks", [(1, 1, 2), (0, 0, 3)])
def test_random_blocks_are_as_many_as_asked_for_where_there_are_that_many(window, global_blocks, random_blocks, causal, shape):
    T, S = SHAPES[shape]
    spec = f"block(block={BLOCK}, window_blocks={window}, global_blocks={global_blocks}, random_blocks={random_blocks}, seed=5)"
    for I, (extra, candidates) in drawn(blocks_seen(spec, T, S, causal, "reference"), window, global_blocks, S, causal).items():
        assert extra <= candidates
        assert len(extra) == (min(random_blocks, len(candidates)) if I >= global_blocks else 0), f"row {I}"


@pytest.mark.parametrize("causal", DIRECTION, ids=DIRECTION.values())
def test_random_blocks_in_the_fast_form(causal):
    spec = f"block(block={BLOCK}, random_blocks=2, seed=5)"
    rows = blocks_seen(spec, 41, 41, causal)
    assert rows == blocks_seen(spec, 41, 41, causal, "reference")
    expected = table(lambda i, j: j // BLOCK in rows[i // BLOCK] and (j <= i or not causal), 41, 41)
    assert_sees(make(spec, causal), expected, 41, 41)


def test_the_draw_is_fixed_by_its_seed_and_reaches_every_block():
    spec = lambda seed: f"block(block={BLOCK}, window_blocks=0, global_blocks=0, random_blocks=2, seed={seed})"
    draws = [blocks_seen(spec(seed), 41, 41, True, "reference") for seed in range(40)]
    assert draws[3] == blocks_seen(spec(3), 41, 41, True, "reference")
    assert len({str(draw) for draw in draws}) == 40
    counts = np.array([sum(J in draw[10] for draw in draws) for J in range(10)])  # of 40 draws of 2 of the 10 blocks before
    assert counts.sum() == 80 and counts.min() >= 1 and counts.max() <= 20
    assert len({tuple(sorted(draws[0][I] - {I})) for I in range(3, 11)}) > 1, "rows draw apart from each other"
