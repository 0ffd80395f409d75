"""The routing-transformer package against `routing`, with its centroids.

Taken out: it scores queries and keys as they come, where the paper scores normalised ones (they are normalised before they go in), and a causal
layer of it has a learned null key, or with shared queries and keys hides a token from itself; the paper has neither (the null key is removed).
Invalid tokens may be taken by its centroids and fill their windows: here they lie where no centroid takes them.
Not compared: its sum of distances from the centroids that is added to the loss, and its first centroids, both the package's own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from peers import peer

routing = peer("routing_transformer.routing_transformer")

from attn_zoo import make_attention
from peers.agreement import agree, heads_first, normal, torch

B, T, N, H, C, W = 2, 40, 2, 8, 4, 10
F = torch.nn.functional


def pair(causal=False, decay=0.999, towards=0.0):
    """(ours, theirs) with the same centroids, drawn around `towards`."""
    attention = make_attention(f"routing(clusters={C}, window={W}, decay={decay})", num_heads=N, head_dim=H, max_len=T, causal=causal)
    attention.centroids[...] = attention.centroids[...] + towards
    module = routing.KmeansAttention(C, W, N, H, causal=causal).eval()
    module.kmeans.means.copy_(torch.tensor(np.asarray(attention.centroids[...])))
    module.kmeans.initted.fill_(True)
    module.num_mem_kv = 0
    module.mem_key, module.mem_value = (torch.nn.Parameter(torch.zeros(N, C, 0, H)) for _ in range(2))
    return attention, module


def on_sphere(x):
    return F.layer_norm(x, (H,), eps=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_attention_within_clusters(causal, masked):
    direction_H = np.array([1, -1] * (H // 2), np.float32)
    attention, module = pair(causal, towards=2 * direction_H)
    q, k, v = (normal(B, T, N, H, seed=seed) for seed in range(3))
    valid_BT = np.arange(T) < np.array([[T], [30]]) if masked else np.ones((B, T), bool)
    q[~valid_BT] = k[~valid_BT] = -direction_H
    mask = {"query_mask": torch.tensor(valid_BT)} if masked else {}
    attend = heads_first(lambda q, k, v: module(on_sphere(q), on_sphere(k), v, **mask)[0])
    valid_BS = jnp.asarray(valid_BT) if masked else None
    if causal:  # queries are keys
        agree(lambda q, v: attention(q, q, v, valid_BS=valid_BS), lambda q, v: attend(q, q, v), q, v, rows_BT=valid_BT)
    else:
        agree(lambda q, k, v: attention(q, k, v, valid_BS=valid_BS), attend, q, k, v, rows_BT=valid_BT)


def test_centroids_move_in_the_same_direction():
    """Without memory, the new centroids are the mean of the tokens nearest to each, as far as their direction goes: theirs are normalised."""
    attention, module = pair(decay=0.0)
    q, k, v = (normal(B, T, N, H, seed=seed) for seed in range(3))
    tokens = torch.cat([on_sphere(torch.tensor(x).transpose(1, 2)) for x in (q, k)], dim=2)
    means = routing.kmeans_iter(F.normalize(tokens, dim=-1), module.kmeans.means)
    graph, state = nnx.split(attention)

    @jax.jit
    def train(state, *args):
        layer = nnx.merge(graph, state)
        layer(*args, key=jax.random.key(0))
        return layer.centroids[...]

    moved = F.normalize(torch.tensor(np.asarray(train(state, *map(jnp.asarray, (q, k, v))))), dim=-1)
    assert (means - F.normalize(module.kmeans.means, dim=-1)).abs().max() > 0.1
    np.testing.assert_allclose(moved, means, rtol=0, atol=1e-4)
