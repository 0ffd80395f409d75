"""Tree attention: a query sees near positions one by one, and farther ones as spans that double in length with the distance.

BP-Transformer (Ye et al. 2019): binary partitioning makes a tree whose leaves are the positions and whose nodes at level l are spans of 2^l.
On each side of itself a query sees `neighbours` nodes a level, from the leaves next to it upward, as many levels as the sequence needs; where
the level's nodes do not begin where the last one ended, the first is the half that closes the gap (as in the authors' graph builder). So
what a query sees covers every position exactly once, in O(k log(T / k)) nodes, and spans before it end before it: causal is the left side.

The paper's span nodes have states, updated from their positions in every layer. Here, where a layer knows queries, keys and values alone, a
span's key and value are the means of those of its valid positions. Left out is the paper's learned bias by level and place among neighbours.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from attn_zoo.attention.base import Attention, Paper, Variant, softmax_reference
from attn_zoo.attention.pattern import pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.gathered import gathered_attention
from attn_zoo.ops.slots import attend_listed
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """neighbours: nodes seen on each side at each level, the paper's k."""

    neighbours: int = 4

    def __post_init__(self):
        check_int("neighbours", self.neighbours, 1)


def level_sizes(S: int) -> list[int]:
    """Nodes a level, from S leaves up to one root; the last node of a level may be cut short."""
    sizes = [S]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


@functools.lru_cache(maxsize=32)
def nodes_seen(neighbours: int, T: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """(index [T, R] among the nodes of all levels, leaves first; seen [T, R]): the spans of each query, as gathered_attention takes them."""
    first = np.concatenate([[0], np.cumsum(level_sizes(T))])
    left, right = np.arange(T), np.arange(T) + 1  # positions before `left` and from `right` on are not covered yet
    end = 0 if causal else T
    index, seen, level = [np.arange(T)], [np.ones(T, bool)], 0
    while (left > 0).any() or (right < end).any():
        for _ in range(min(neighbours, T)):
            for edge, ahead in ((left, False), (right, True)):
                fitting = level - (edge % 2**level != 0)  # the half where a span of this level does not begin (end) at the edge
                uncovered = edge < end if ahead else edge > 0
                index.append(np.where(uncovered, first[fitting] + (edge >> fitting) - (not ahead), 0))
                seen.append(uncovered)
                edge += np.where(uncovered, (1 if ahead else -1) << fitting, 0)
        level += 1
    used = np.any(seen, axis=1)
    return np.stack(index, 1)[:, used].astype(np.int32), np.stack(seen, 1)[:, used]


class Rings(NamedTuple):
    """Where a decoder keeps the spans that a later query may see: of every level the last few, in a ring of its own."""

    counts: np.ndarray  # [levels], how many
    first: np.ndarray  # [levels], the slot that a level's ring begins at
    slots: np.ndarray  # [T, R], of what each query sees


@functools.lru_cache(maxsize=32)
def rings(neighbours: int, T: int) -> Rings:
    """Of the spans that causal queries see among T positions."""
    index, seen = nodes_seen(neighbours, T, True)
    nodes = np.cumsum([0, *level_sizes(T)])
    level = np.searchsorted(nodes, index, side="right") - 1
    node = index - nodes[level]
    back = np.where(seen, (np.arange(T)[:, None] >> level) - node, 0)  # from the span of its level that the query is in
    counts = np.ones(len(nodes) - 1, int)
    np.maximum.at(counts, level, back + 1)
    first = np.cumsum(counts) - counts
    return Rings(counts, first, np.where(seen, first[level] + node % counts[level], 0).astype(np.int32))


def span_means(x_BSKH, valid_BS):
    """(means over the valid positions of every span [B, nodes, K, H] in float32, whether it has any [B, nodes]), the leaves first."""
    B, S = x_BSKH.shape[:2]
    total = x_BSKH.astype(jnp.promote_types(x_BSKH.dtype, jnp.float32))
    count = jnp.ones((B, S), total.dtype) if valid_BS is None else valid_BS.astype(total.dtype)
    totals, counts = [total], [count]
    for size in level_sizes(S)[1:]:
        pairs = lambda x: jnp.pad(x, [(0, 0), (0, 2 * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)).reshape(B, size, 2, *x.shape[2:]).sum(axis=2)
        totals.append(pairs(totals[-1]))
        counts.append(pairs(counts[-1]))
    count = jnp.concatenate(counts, axis=1)
    return jnp.concatenate(totals, axis=1) / jnp.maximum(count, 1)[:, :, None, None], count > 0


class Tree(Attention):
    """Leaves nearby, spans farther away."""

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        index, seen = nodes_seen(self.options.neighbours, q_BTNH.shape[1], self.dims.causal)
        (k, valid), (v, _) = span_means(k_BSKH, valid_BS), span_means(v_BSKH, valid_BS)
        valid = None if valid_BS is None else valid
        return gathered_attention(q_BTNH, k, v, jnp.asarray(index), jnp.asarray(seen), valid_BS=valid, backend=self.backend())[0]

    def backend(self, masked=False):
        return backends.choose_lists(self.dims.backend, self.dims.dtype)

    def init_cache(self, B, max_len):
        """The means of the last few spans of every level: a query sees no others, and of the past alone, where spans are whole."""
        self.check_decoding(max_len)
        shape = (B, int(rings(self.options.neighbours, self.dims.max_len).counts.sum()), self.dims.num_kv_heads, self.dims.head_dim)
        return {name: jnp.zeros(shape, jnp.promote_types(self.dims.dtype, jnp.float32)) for name in ("k", "v")} | {"t": jnp.zeros((), jnp.int32)}

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        t, kept = cache["t"], rings(self.options.neighbours, self.dims.max_len)
        level = np.arange(len(kept.counts))
        above = kept.first + (t >> level) % kept.counts  # the leaf and its spans, one a level
        share = (2.0**-level)[:, None, None]
        begins = (t % 2**level == 0)[:, None, None]  # and takes the place of an older one
        mean = lambda old, x: jnp.where(begins, 0.0, old[:, above]) + x * share
        cache = cache | {name: cache[name].at[:, above].set(mean(cache[name], x)) for name, x in (("k", k_B1KH), ("v", v_B1KH))}
        seen = jnp.asarray(nodes_seen(self.options.neighbours, self.dims.max_len, True)[1])
        return attend_listed(q_B1NH, cache, jnp.asarray(kept.slots)[t], seen[t])[0], cache | {"t": t + 1}

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        """Every span's mean by a matrix of its positions, every query's spans by walking outward from it."""
        B, T = q_BTNH.shape[:2]
        spans = {}  # (start, stop) -> its place
        rows = [[spans.setdefault(span, len(spans)) for span in _spans_of(i, T, self.options.neighbours, self.dims.causal)] for i in range(T)]
        mask_TC = np.zeros((T, len(spans)), bool)
        for i, row in enumerate(rows):
            mask_TC[i, row] = True
        start, stop = np.array(list(spans)).T[:, :, None]
        in_span_CS = (start <= np.arange(T)) & (np.arange(T) < stop)
        in_span_BCS = jnp.asarray(in_span_CS[None] & (np.ones((B, 1, T), bool) if valid_BS is None else valid_BS[:, None]), k_BSKH.dtype)
        count_BC = in_span_BCS.sum(axis=-1)
        k, v = (jnp.einsum("BCS,BSKH->BCKH", in_span_BCS, x, precision="highest") / jnp.maximum(count_BC, 1)[:, :, None, None] for x in (k_BSKH, v_BSKH))
        return softmax_reference(q_BTNH, k, v, mask_TC & (count_BC > 0)[:, None, None])


def _spans_of(i: int, T: int, neighbours: int, causal: bool) -> list[tuple[int, int]]:
    """What query i sees, as (start, stop): itself, then on each side `neighbours` spans of every length."""
    spans, start, length = [(i, i + 1)], i, 1
    while start > 0:
        for _ in range(neighbours):
            if start > 0:
                stop, start = start, start - (length if start % length == 0 else length // 2)
                spans.append((start, stop))
        length *= 2
    stop, length = i + 1, 1
    while stop < T and not causal:
        for _ in range(neighbours):
            if stop < T:
                start, stop = stop, stop + (length if stop % length == 0 else length // 2)
                spans.append((start, min(stop, T)))
        length *= 2
    return spans


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """The spans that queries see, and the sums that make the spans, about S additions each for keys and values."""
    return pair_flops(int(nodes_seen(options.neighbours, T, causal)[1].sum()), B, N, H) + 2.0 * B * N * S * H


TREE = Variant(
    name="tree",
    family="position-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Tree(options, dims),
    paper=Paper(
        "ye2019bp",
        "{BP}-Transformer: Modelling Long-Range Context via Binary Partitioning",
        "Ye, Zihao and Guo, Qipeng and Gan, Quan and Qiu, Xipeng and Zhang, Zheng",
        2019,
        "arXiv:1911.04070",
    ),
    complexity="T k log(T / k)",
    flops=flops,
    time_order=1.15,  # the slope of T log(T / k) at some thousand positions
    memory_order=1.0,
    exact_when=lambda T: {"neighbours": T},
    decode=True,
    state_order=0.15,  # the slope of k log(T / k)
    cross="what a query sees one by one, and what as spans, goes by its own place in the sequence",
)
