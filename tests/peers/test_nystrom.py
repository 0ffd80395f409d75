"""The nystrom-attention package against `nystrom`.

Its pseudo-inverse starts from the largest norms in the batch, ours from each matrix's own, as in the paper: it is handed one matrix at a time.
Not compared: lengths that the landmarks do not divide, where it pads at the start and ours makes segments as equal as can be, and segments
without a valid position, whose landmark stays a uniform row of its matrix and is left out of ours.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from peers import peer

nystrom = peer("nystrom_attention.nystrom_attention")

from attn_zoo import make_attention
from peers.agreement import agree, linear, merge_heads, normal, split_heads, torch

B, T, N, H, R, D = 2, 24, 2, 8, 6, 16


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("residual", [None, 5], ids=["plain", "residual"])
def test_landmarks_of_segments(residual, masked, monkeypatch):
    invert = nystrom.moore_penrose_iter_pinv
    one_by_one = lambda x, iters: torch.stack([invert(matrix[None], iters)[0] for matrix in x.flatten(0, 1)]).unflatten(0, x.shape[:2])
    monkeypatch.setattr(nystrom, "moore_penrose_iter_pinv", one_by_one)
    module = nystrom.NystromAttention(D, H, N, num_landmarks=R, residual=residual is not None, residual_conv_kernel=residual or 33).eval()
    attention = make_attention(f"nystrom(landmarks={R}, residual_kernel={residual})", num_heads=N, head_dim=H, max_len=T)
    if residual:
        attention.taps[...] = jnp.asarray(module.res_conv.weight.detach()[:, 0, :, 0])
    valid_BT = np.arange(T) < np.array([[T], [T - 3]])
    valid_BT[0, [5, 8, 9]] = False
    theirs = lambda x: module(x, mask=torch.tensor(valid_BT) if masked else None)

    def ours(x):
        qkv = jnp.split(linear(module.to_qkv)(x), 3, axis=-1)
        o = attention(*(split_heads(y, N) for y in qkv), valid_BS=jnp.asarray(valid_BT) if masked else None)
        return linear(module.to_out[0])(merge_heads(o))

    agree(ours, theirs, normal(B, T, D), rows_BT=valid_BT if masked else None)
