"""The performer-pytorch package's FastAttention against `performer`, with the same random features, and without any against `linear`.

It adds 1e-4 to every feature (1e-3 after a relu) and 1e-6 to the sum of a causal query's, which biases the estimate; ours
adds nothing, so all are set to zero.
Not compared: padding, which its FastAttention does not know, and how features are drawn: the package takes Q of a QR decomposition as it
comes, with LAPACK's signs, where ours makes it uniform.
"""

import functools

import numpy as np
import pytest

from peers import peer

performer = peer("performer_pytorch.performer_pytorch")

from attn_zoo import make_attention
from peers.agreement import agree, heads_first, normal, torch

B, T, N, H, R = 2, 40, 2, 8, 12
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def theirs(module):
    if module.causal:
        module.causal_linear_fn = functools.partial(performer.causal_linear_attention_noncuda, eps=0.0)
    return heads_first(module)


@CAUSAL
def test_random_features(causal, monkeypatch):
    monkeypatch.setattr(performer, "softmax_kernel", functools.partial(performer.softmax_kernel, eps=0.0))
    attention = make_attention(f"performer(features={R})", num_heads=N, head_dim=H, max_len=T, causal=causal)
    module = performer.FastAttention(H, R, causal=causal)
    module.projection_matrix.copy_(torch.tensor(np.asarray(attention.directions[...])))
    agree(attention, theirs(module), *(normal(B, T, N, H, seed=seed) for seed in range(3)))


@CAUSAL
def test_relu_of_queries_and_keys_themselves(causal, monkeypatch):
    """Shifted, so that no row is without a positive feature, which is 0 / 0 there."""
    monkeypatch.setattr(performer, "generalized_kernel", functools.partial(performer.generalized_kernel, kernel_epsilon=0.0))
    attention = make_attention("linear(feature_map='relu')", num_heads=N, head_dim=H, max_len=T, causal=causal)
    module = performer.FastAttention(H, R, causal=causal, generalized_attention=True)
    module.projection_matrix = None
    agree(attention, theirs(module), *(normal(B, T, N, H, seed=seed) + 1 for seed in range(3)))
