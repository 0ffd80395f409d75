"""The sinkhorn-transformer package's bidirectional attention, with its simple sorting network, against `sinkhorn`.

Taken out: the logits of its network pass through log(relu(x) + 1e-6), which ours and the first author's code do not have, and its network sees sums of
queries and keys where ours sees means of keys. Its sorted values are its sorted keys (b_v_r is made from b_k_r): it is given keys [k, v] and queries
[q, 0], so that its sorted keys hold the sorted values too.
Not compared: its causal form, which sorts by a softmax over the best past blocks, without Sinkhorn's iteration, beside a learned null block, and shifts half of
its heads; and padding, which it hides by the validity of the one block that weighs most in a sorted one.
"""

import jax
import numpy as np
import pytest
from flax import nnx

from peers import peer

sinkhorn = peer("sinkhorn_transformer.sinkhorn_transformer")

from attn_zoo import make_attention
from peers.agreement import agree, heads_first, normal, torch

B, T, N, H, W = 2, 40, 2, 8, 8
C = T // W


@pytest.mark.parametrize("noisy", [False, True], ids=["deterministic", "gumbel_noise"])
def test_sorted_and_own_block(noisy, monkeypatch):
    """Gradients too, of the sorting network's weights as well."""
    key = jax.random.key(0) if noisy else None
    noise_BNCC = jax.random.gumbel(key, (B, N, C, C)) if noisy else np.zeros((B, N, C, C), np.float32)
    monkeypatch.setattr(sinkhorn, "sample_gumbel", lambda *_: torch.tensor(np.asarray(noise_BNCC)).flatten(0, 1))
    monkeypatch.setattr(sinkhorn, "log", lambda x: x)
    module = sinkhorn.SinkhornAttention(W, 2 * H * N, 2 * H, N, T, temperature=0.5, non_permutative=False, sinkhorn_iter=4, use_simple_sort_net=True)
    module.sort_net.act = torch.nn.Identity()

    def theirs(q, k, v, weight):
        # [q, 0, k, v] are what the network's weights see; the scale of scores is (2 H)^-1/2.
        weight = torch.nn.functional.pad(weight / W, (0, 0, 2 * H, H))[None]
        queries, keys = torch.cat([q * 2**0.5, torch.zeros_like(q)], dim=-1), torch.cat([k, v], dim=-1)
        run = lambda *x: torch.func.functional_call(module, {"sort_net.linear": weight}, x)
        return heads_first(run)(queries, keys, keys)[..., H:]

    def ours(q, k, v, weight):
        layer = make_attention(f"sinkhorn(block={W}, iterations=4, temperature=0.5)", num_heads=N, head_dim=H, max_len=T)
        layer.weight = nnx.Param(weight)
        return layer(q, k, v, key=key)

    agree(ours, theirs, *(normal(B, T, N, H, seed=seed) for seed in range(3)), normal(N, H, C, seed=3))
