"""The linformer package against `linformer`. It knows neither padding masks nor projections of a head's own, so those are not compared."""

import pytest
from flax import nnx

from peers import peer

linformer = peer("linformer.linformer")

from attn_zoo import make_attention
from peers.agreement import agree, linear, merge_heads, normal, split_heads, torch

D, L, R, N, H = 24, 20, 6, 4, 8


def run_ours(peer, K, share):
    """A function of (x, context, *projections) that is `linformer` between the peer's linear layers."""

    def ours(x, context, *projections):
        layer = make_attention(f"linformer(rank={R}, share={share!r})", num_heads=N, num_kv_heads=K, head_dim=H, max_len=L)
        layer.key_projection, layer.value_projection = (nnx.Param(projections[n].T[None]) for n in (0, -1))
        q = split_heads(linear(peer.to_q)(x), N)
        k = split_heads(linear(peer.to_k)(context), K)
        v = k if peer.share_kv else split_heads(linear(peer.to_v)(context), K)
        return linear(peer.to_out)(merge_heads(layer(q, k, v)))

    return ours


@pytest.mark.parametrize(
    "options, share, S",
    [({}, "heads", L), ({}, "heads", 13), ({"one_kv_head": True}, "heads", L), ({"share_kv": True}, "kv", L)],
    ids=["heads", "first_columns", "one_kv_head", "share_kv"],
)
def test_attention_to_a_context(options, share, S):
    """Outputs, and gradients with respect to queries, keys and values' inputs and to the projections."""
    module = linformer.LinformerSelfAttention(D, L, k=R, heads=N, dim_head=H, **options).eval()
    projections = {"proj_k": module.proj_k} | ({} if module.share_kv else {"proj_v": module.proj_v})

    def theirs(x, context, *values):
        return torch.func.functional_call(module, dict(zip(projections, values)), (x,), {"context": context})

    K = 1 if options.get("one_kv_head") else N
    agree(run_ours(module, K, share), theirs, normal(2, 9, D), normal(2, S, D, seed=1), *(x.detach().numpy() for x in projections.values()))
