"""A picture of the sparse variants of the zoo: what sees what, query down and key across.

What depends on positions alone is shown where all scores are equal: the weight of a pair is then the pattern, spans and relays included. It is found without a
T x S array of weights, by values that tell their block: the output at t is how its weight is spread over blocks. What depends on content is shown on
random queries and keys.
"""

import jax
import numpy as np
from matplotlib.figure import Figure

from attn_zoo.attention import VARIANTS, find, make_attention
from attn_zoo.attention.pattern import pair_flops
from attn_zoo.attention.weights import attention_weights
from attn_zoo.attention_figures import PAGE, axes_at, canvas, wrapped, write
from attn_zoo.figures import FONT

ELEMENTS, LONG, BLOCK = 64, 2048, 64  # positions of the small picture and of the large, and of its blocks
POSITIONS, CONTENT = ("position-based sparse",), ("content-based sparse", "query prototypes")
# Sizes that show in 64 positions; a variant that is not here is shown at its defaults.
SMALL = {
    "local": "local(window=4)",
    "strided": "strided(stride=8)",
    "block": "block(block=8, random_blocks=1)",
    "block_local": "block_local(block=16)",
    "dilated": "dilated(window=4, dilation=3)",
    "fixed": "fixed(stride=8, summary=2)",
    "axial": "axial(width=8)",
    "global_window": "global_window(window=4, globals=2)",
    "bigbird": "bigbird(window=3, globals=2, random=3)",
    "random": "random(k=6)",
    "tree": "tree(neighbours=2)",
    "lsh": "lsh(bucket_size=8)",
    "routing": "routing(clusters=8)",
    "sinkhorn": "sinkhorn(block=8)",
    "topk": "topk(k=6)",
    "clustered": "clustered(clusters=8, topk=6)",
    "informer": "informer(factor=3)",
}
SHARPNESS = 2.0  # standard deviation of the random scores


def small(name: str) -> str:
    """The spec by which a variant is shown in 64 positions."""
    return SMALL.get(name, name)


def shares(spec: str, T: int, block: int) -> np.ndarray:
    """How each block of queries spreads its weight over blocks of keys, [T / block, T / block], where all scores are equal, without a causal mask."""
    C = T // block
    attention = make_attention(spec, num_heads=1, head_dim=C, max_len=T, backend="xla")
    equal_BTNH = np.zeros((1, T, 1, C), np.float32)
    tell_BSKH = np.repeat(np.eye(C, dtype=np.float32), block, axis=0)[None, :, None]
    o_BTNH = jax.jit(attention)(equal_BTNH, equal_BTNH, tell_BSKH)
    return np.asarray(o_BTNH)[0, :, 0].reshape(C, block, C).mean(axis=1)


def drawn_weights(spec: str, T: int, H: int = 16) -> np.ndarray:
    """The weights [T, T] of one head on queries and keys drawn from a normal distribution; where a variant's keys are its queries, they are here."""
    attention = make_attention(spec, num_heads=1, head_dim=H, max_len=T, backend="xla")
    rng = np.random.RandomState(0)
    q, k, v = (rng.standard_normal((1, T, 1, H)).astype(np.float32) for _ in range(3))
    q, k = (np.sqrt(SHARPNESS) * x for x in (q, k))
    return np.asarray(jax.jit(lambda q, k, v: attention_weights(attention, q, k, v))(q, q if attention.shares_query_key else k, v))[0, 0]


def densities(name: str, T: int) -> str:
    """Work of a variant at its defaults as a share of that of full attention: useful, and where it runs in blocks, computed."""
    variant, options = find(name)
    useful = variant.flops(options, 1, T, T, 1, 64, False) / pair_flops(T * T, 1, 1, 64)
    computed = make_attention(name, num_heads=1, head_dim=64, max_len=T, backend="xla").plan(T, T).get("computed_density")
    return f"pairs {_percent(useful)}" + (f", computed {_percent(computed)}" if computed is not None else "")


def patterns() -> Figure:
    """All sparse variants: by position in pairs of 64 positions and of blocks of 2,048, by content in 64 positions."""
    by_position, by_content = ([name for name, v in VARIANTS.items() if v.family in families] for families in (POSITIONS, CONTENT))
    across, side, gap, margin = 3, 1.06, 0.08, 0.08
    pair, row = (PAGE - 2 * margin) / across, 0.17 + side + 0.24
    texts = (
        f"What sees what, by position: query down, key across, not causal. Left {ELEMENTS} positions; right {LONG:,} positions at the default options, in "
        f"blocks of {BLOCK}. The darker, the greater the weight, relative to the largest of its row, where all scores are equal; a block that is "
        "white holds no pair. Pairs: useful work as a share of that of full attention; computed: the share of pairs in the blocks that are computed, where "
        "there are such, after folding and gathering.",
        f"By content, {ELEMENTS} positions: actual weights, relative to the largest of the picture, on one draw of random queries and keys. "
        "Others give another picture.",
    )
    notes = [wrapped(text, PAGE) for text in texts]
    space = [len(lines) * 1.35 * FONT / 72 + 0.12 for lines in notes]
    down, wide = -(-len(by_position) // across), 6
    below = -(-len(by_content) // wide)
    content_row = 0.3 + side
    start = space[0] + down * row
    figure = canvas(PAGE, start + space[1] + below * content_row + 0.08)
    write(figure, margin, 0.05, notes[0], FONT)
    for n, name in enumerate(by_position):
        r, c = divmod(n, across)
        left, top = margin + c * pair, space[0] + r * row + 0.17
        for x, weights_TS in ((left, shares(small(name), ELEMENTS, 1)), (left + side + gap, shares(name, LONG, BLOCK))):
            _matrix(figure, x, top, side, weights_TS, weights_TS.max(axis=1, keepdims=True))
        write(figure, left, top - 0.13, [small(name)], FONT - 1)
        write(figure, left + side + gap, top + side + 0.03, [f"{name}, T = {LONG:,}", densities(name, LONG)], FONT - 2)
    write(figure, margin, start + 0.05, notes[1], FONT)
    step = (PAGE - 2 * margin) / wide
    for n, name in enumerate(by_content):
        r, c = divmod(n, wide)
        left, top = margin + c * step, start + space[1] + r * content_row + 0.26
        spec, _, options = small(name).partition("(")
        write(figure, left, top - 0.24, [spec, options.rstrip(")")], FONT - 1.5)
        weights_TS = drawn_weights(small(name), ELEMENTS)
        _matrix(figure, left, top, side, weights_TS, weights_TS.max())
    return figure


def _matrix(figure: Figure, left: float, top: float, side: float, weights_TS: np.ndarray, largest: np.ndarray | float) -> None:
    ax = axes_at(figure, left, top, side, side)
    # The square root, so that a relay or a far span shows beside what is near; least of all shades that is not white.
    shade = np.sqrt(np.clip(weights_TS / largest, 0, 1))
    ax.imshow(np.where(shade > 1e-3, np.maximum(shade, 0.08), 0), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
