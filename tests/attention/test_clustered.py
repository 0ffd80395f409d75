"""Clustered attention: K-means on hashes against a loop, when clusters lose nothing, and what redoing the best keys is worth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import make_attention
from attn_zoo.attention.clustered import kmeans

T, S, N = 48, 8, 1
H = S  # so that with values that are unit vectors an output is the row of weights


@functools.cache
def layer(**options):
    """(q, k) -> (weights [T, S], the cluster of each query)."""
    attention = make_attention(f"clustered({', '.join(f'{o}={x}' for o, x in options.items())})", num_heads=N, head_dim=H, max_len=T)
    return jax.jit(lambda q, k: (attention(q, k, jnp.eye(S)[None, :, None])[0, :, 0], attention.cluster(q, None)[0][0, 0]))


def run(q, k, **options):
    return [np.asarray(x) for x in layer(**options)(q, k)]


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    q, k = (jnp.asarray(2 * rng.normal(size=(1, L, N, H)), jnp.float32) for L in (T, S))
    return q, k, softmax(np.asarray(q[0, :, 0] @ k[0, :, 0].T) / np.sqrt(H))


def kmeans_by_counting(bits, valid, clusters, iterations):
    """Lloyd's algorithm on the valid rows of `bits`, distance by distance."""
    bits = bits[valid]
    centroids = bits[:clusters].copy()
    nearest = lambda: np.array([min(range(clusters), key=lambda c: ((row != centroids[c]).sum(), c)) for row in bits])
    for _ in range(iterations):
        label = nearest()
        for c in set(label.tolist()):
            centroids[c] = bits[label == c].sum(axis=0) * 2 > (label == c).sum()
    return nearest()


@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_kmeans_is_that_of_a_loop(iterations):
    rng = np.random.default_rng(0)
    bits = rng.random((2, 3, 30, 7)) > 0.5
    valid = rng.random((2, 3, 30)) > 0.3
    label, member = kmeans(jnp.where(bits, 1.0, -1.0), jnp.asarray(valid), 5, iterations)
    for b, n in np.ndindex(2, 3):
        np.testing.assert_array_equal(label[b, n][valid[b, n]], kmeans_by_counting(bits[b, n], valid[b, n], 5, iterations))
    np.testing.assert_array_equal(member.sum(axis=-1), valid)
    np.testing.assert_array_equal(member.argmax(axis=-1)[valid], label[valid])


def test_clusters_of_equal_queries_lose_nothing():
    """Six different queries, eight times each, in seven clusters, of which one stays empty."""
    q, k, _ = inputs()
    q = jnp.tile(q[:, :6], (1, T // 6, 1, 1))
    weights, label = run(q, k, clusters=7, topk=0)
    assert len(set(label.tolist())) == 6
    np.testing.assert_allclose(weights, softmax(np.asarray(q[0, :, 0] @ k[0, :, 0].T) / np.sqrt(H)), atol=1e-5)


def test_a_cluster_attends_as_its_mean_query():
    q, k, _ = inputs()
    weights, label = run(q, k, clusters=7, topk=0)
    for c in set(label.tolist()):
        mean = np.asarray(q[0, label == c, 0]).mean(axis=0)
        np.testing.assert_allclose(weights[label == c], np.tile(softmax(mean @ np.asarray(k[0, :, 0]).T / np.sqrt(H)), ((label == c).sum(), 1)), atol=1e-5)


def test_best_keys_are_redone_within_their_mass():
    """On the best keys of its cluster a query has its own softmax, with the centroid's mass; elsewhere the centroid's weights. Vyas et al. 2020, sec. 3.3."""
    q, k, exact = inputs()
    by_cluster, label = run(q, k, clusters=7, topk=0)
    improved, same_label = run(q, k, clusters=7, topk=3)
    np.testing.assert_array_equal(label, same_label)
    for t in range(T):
        best = np.argsort(-by_cluster[t])[:3]
        others = np.setdiff1d(np.arange(S), best)
        np.testing.assert_allclose(improved[t, others], by_cluster[t, others], atol=1e-6)
        np.testing.assert_allclose(improved[t, best], by_cluster[t, best].sum() * exact[t, best] / exact[t, best].sum(), atol=1e-5)


def test_redoing_best_keys_brings_every_query_nearer():
    """In L1 distance to its own softmax, query by query: proposition 2 of Vyas et al. 2020. All keys redone is full attention."""
    q, k, exact = inputs()
    distances = [abs(run(q, k, clusters=7, topk=topk)[0] - exact).sum(axis=1) for topk in (0, 3, 8)]
    for topk in (1, 2):
        assert (distances[topk] <= distances[0] + 1e-5).all()
    means = [d.mean() for d in distances]
    assert means == sorted(means, reverse=True) and means[0] > 0.3 and means[-1] < 1e-5


def test_error_falls_with_the_number_of_clusters():
    rng = np.random.default_rng(0)
    _, k, _ = inputs()
    q = jnp.asarray((4 * rng.normal(size=(12, H)))[np.arange(T) % 12] + 0.3 * rng.normal(size=(T, H)), jnp.float32)[None, :, None]  # twelve bunches
    exact = softmax(np.asarray(q[0, :, 0] @ k[0, :, 0].T) / np.sqrt(H))
    errors = [abs(run(q, k, clusters=C, topk=0)[0] - exact).sum(axis=1).mean() for C in (1, 7, 12)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < errors[0] / 4


def test_gradients_of_a_query_are_shared_by_its_cluster():
    q, k, _ = inputs()
    attention = make_attention("clustered(clusters=7, topk=0)", num_heads=N, head_dim=H, max_len=T)
    label = np.asarray(attention.cluster(q, None)[0])[0, 0]
    dq = np.asarray(jax.jit(jax.grad(lambda q: attention(q, k, jnp.eye(S)[None, :, None])[0, 5, 0, 2]))(q))[0, :, 0]
    together = label == label[5]
    assert together.sum() > 1 and (dq[~together] == 0).all() and (dq[5] != 0).all()
    np.testing.assert_allclose(dq[together], np.tile(dq[5], (together.sum(), 1)), rtol=1e-5)
