"""Which pairs the further position-based variants see, black box: with one-hot values, a positive output is a visible key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import UserError, make_attention
from attn_zoo.ops import backends

DEFINITIONS = {  # written from the papers' definitions, one pair at a time
    "block_local(block=7)": lambda i, j: i // 7 == j // 7,
    "dilated(window=3, dilation=4)": lambda i, j: abs(i - j) in (0, 4, 8, 12),
    "fixed(stride=6, summary=2)": lambda i, j: i // 6 == j // 6 or j % 6 in (4, 5),
    "fixed(stride=5, summary=0)": lambda i, j: i // 5 == j // 5,
    "axial(width=9)": lambda i, j: i // 9 == j // 9 or i % 9 == j % 9,
    "axial(width=9, axis='row')": lambda i, j: i // 9 == j // 9,
    "axial(width=9, axis='column')": lambda i, j: i % 9 == j % 9,
    "strided(stride=8, band=2)": lambda i, j: abs(i - j) <= 2 or (i - j) % 8 == 0,
    "strided(stride=8, band=0)": lambda i, j: (i - j) % 8 == 0,
    "strided(stride=5, band=13)": lambda i, j: abs(i - j) <= 13 or (i - j) % 5 == 0,
    "strided(stride=1000, band=3)": lambda i, j: abs(i - j) <= 3,
    "strided(stride=1000000000)": lambda i, j: True,
    "dilated(window=3, dilation=1000000000)": lambda i, j: i == j,
    "axial(width=1000000000)": lambda i, j: True,
    "axial(width=1000000000, axis='column')": lambda i, j: i == j,
    "fixed(stride=1000000000, summary=1)": lambda i, j: True,
    "block_local(block=1000000000)": lambda i, j: True,
    "global_window(window=3, globals=4)": lambda i, j: abs(i - j) <= 3 or i < 4 or j < 4,
    "global_window(window=0, globals=0)": lambda i, j: i == j,
    "bigbird(window=2, globals=5, random=0)": lambda i, j: abs(i - j) <= 2 or i < 5 or j < 5,
    "bigbird(window=2, globals=1, random=60)": lambda i, j: True,  # the draw takes all that is left
    "random(k=60)": lambda i, j: True,
}
LENGTHS = [(41, 41), (23, 41), (41, 23)]


def seen(spec, T, S, causal):
    attention = make_attention(spec, num_heads=2, head_dim=48, max_len=48, causal=causal)
    keys = jax.random.split(jax.random.key(0), 2)
    q, k = (jax.random.normal(key, (1, n, 2, 48)) for key, n in zip(keys, (T, S)))
    v = jnp.broadcast_to(jnp.eye(S, 48)[None, :, None], (1, S, 2, 48))
    o = np.asarray(jax.jit(attention)(q, k, v))[0, :, :, :S]
    np.testing.assert_array_equal(o[:, 0] > 0, o[:, 1] > 0)
    return o[:, 0] > 0, attention


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("T, S", LENGTHS)
@pytest.mark.parametrize("spec", DEFINITIONS)
def test_sees_what_its_definition_says(spec, T, S, causal):
    expected = np.array([[DEFINITIONS[spec](i, j) and (j <= i or not causal) for j in range(S)] for i in range(T)])
    actual, attention = seen(spec, T, S, causal)
    np.testing.assert_array_equal(actual, expected)
    assert attention.flops(3, T, S) == 4 * 3 * 2 * 48 * expected.sum()


@pytest.mark.parametrize("T, S", LENGTHS)
@pytest.mark.parametrize("spec", DEFINITIONS)
def test_the_plan_tells_the_share_of_pairs(spec, T, S):
    i, j = np.arange(T), np.arange(S)
    pairs = sum(bool(DEFINITIONS[spec](a, b)) for a in i for b in j)
    plan = make_attention(spec, num_heads=2, head_dim=16, max_len=48).plan(T, S)
    if "density" in plan:
        assert plan["density"] == pytest.approx(pairs / (T * S)) and plan["computed_density"] >= plan["density"]
    else:
        assert spec.startswith("random")  # its keys are gathered, not computed in blocks


@pytest.mark.parametrize(
    "spec, blocks, beside",
    [
        ("strided(stride=8, band=2)", 22 + 8, 0),  # three diagonals of eight by eight blocks; eight columns of 64 positions
        ("dilated(window=3, dilation=4)", 4 * 4, 0),  # four columns of 128 positions
        ("axial(width=64)", 8 + 64, 0),  # rows, and columns of eight positions, which fill a block no more than that
        ("fixed(stride=64, summary=8)", 8 + 8, 0),  # own blocks; 64 summaries, seen by all
        ("bigbird(window=2, globals=0, random=5)", 22, 512 * 5),
        ("sinkhorn(block=64)", 8 + 8, 0),
        ("persistent(slots=64)", 64 + 8, 0),
    ],
)
def test_the_plan_counts_the_blocks_of_all_parts(spec, blocks, beside, monkeypatch):
    monkeypatch.setattr(backends, "blocks", lambda *args: (64, 64))
    plan = make_attention(spec, num_heads=4, num_kv_heads=2, head_dim=16, max_len=512).plan(512, 512)
    assert plan["computed_density"] * 512**2 == pytest.approx(blocks * 64**2 + beside)
    assert plan.get("computed_pairs", blocks * 64**2) == blocks * 64**2


def test_axial_is_its_two_axes_merged():
    """Each pair of 'both' is in 'row' or in 'column', and the two share the diagonal alone."""
    row, column, both = (seen(f"axial(width=6, axis={axis!r})", 40, 40, False)[0] for axis in ("row", "column", "both"))
    np.testing.assert_array_equal(row | column, both)
    np.testing.assert_array_equal(row & column, np.eye(40, dtype=bool))


def test_strided_reads_an_image_row_by_row():
    """5 x 8 pixels: a pixel sees its column and its two neighbours on each side in raster order."""
    pairs, _ = seen("strided(stride=8, band=2)", 40, 40, False)
    images = pairs.reshape(40, 5, 8)
    expected = np.zeros((5, 8), bool)
    expected[:, 3] = expected[2, 1:6] = True
    np.testing.assert_array_equal(images[2 * 8 + 3], expected)


def test_impossible_options_are_refused():
    for spec, message in (("fixed(stride=4, summary=5)", "summary=5: must be at most stride=4"), ("axial(axis='x')", "axis='x': must be one of")):
        with pytest.raises(UserError, match=message):
            make_attention(spec, num_heads=1, head_dim=8, max_len=8)
