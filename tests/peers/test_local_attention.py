"""The local-attention package against `block_local`, `block` and, where it cuts windows exactly, `local`.

Its shared_qk (normalised keys, no attention to oneself) and its rotary positions are other mechanisms, and stay off.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from peers import peer

local_attention = peer("local_attention")

from attn_zoo import make_attention
from attn_zoo.ops.blocked import blocked_attention
from attn_zoo.ops.patterns import BlockTable
from peers.agreement import agree, heads_first, normal, torch

B, N, H, W = 2, 2, 8, 8
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def module(causal=False, **options):
    return local_attention.LocalAttention(W, causal=causal, use_rotary_pos_emb=False, **options)


def inputs(T):
    return [normal(B, T, N, H, seed=seed) for seed in range(3)]


def ours(spec, T, causal, valid_BT=None):
    attention = make_attention(spec, num_heads=N, head_dim=H, max_len=T, causal=causal)
    return lambda q, k, v: attention(q, k, v, valid_BS=None if valid_BT is None else jnp.asarray(valid_BT))


def theirs(module, valid_BT=None):
    return heads_first(lambda q, k, v: module(q, k, v, mask=None if valid_BT is None else torch.tensor(valid_BT)))


@CAUSAL
def test_own_window_alone_is_block_local(causal):
    agree(ours(f"block_local(block={W})", 40, causal), theirs(module(causal, look_backward=0, look_forward=0)), *inputs(40))


@CAUSAL
def test_windows_that_look_around_are_block_without_global_and_random_blocks(causal):
    spec = f"block(block={W}, window_blocks=2, global_blocks=0, random_blocks=0)"
    agree(ours(spec, 56, causal), theirs(module(causal, look_backward=2, look_forward=0 if causal else 2)), *inputs(56))


def test_windows_that_look_back_further_than_ahead_are_a_pattern():
    rows = tuple(tuple(J for J in range(I - 2, I + 2) if 0 <= J < 5) for I in range(5))
    ours = lambda q, k, v: blocked_attention(q, k, v, pattern=BlockTable(W, rows))[0]
    agree(ours, theirs(module(look_backward=2, look_forward=1)), *inputs(40))


@CAUSAL
def test_exact_windows_are_local(causal):
    peer = module(causal, look_backward=2, look_forward=0 if causal else 2, exact_windowsize=True)
    agree(ours(f"local(window={2 * W})", 56, causal), theirs(peer), *inputs(56))


@CAUSAL
def test_exact_windows_with_padding_at_a_length_that_no_window_divides(causal):
    """Their padding to whole windows is seen by bidirectional queries unless a mask is given, so one is."""
    valid_BT = np.arange(35) < np.array([[35], [22]])
    valid_BT[1, 5] = False
    peer = module(causal, exact_windowsize=True, autopad=True)
    agree(ours(f"local(window={W})", 35, causal, valid_BT), theirs(peer, valid_BT), *inputs(35), rows_BT=valid_BT)
