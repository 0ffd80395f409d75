"""The whole Transformer against one written apart: NumPy, float64, one sequence, one head and one position at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


def norm(p, x):
    if "bias" in p:
        return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * p["scale"] + p["bias"]
    return x / math.sqrt((x * x).mean() + 1e-6) * p["scale"]


def attention(p, rows, causal, valid, rotary):
    T, (_, N, H), K = len(rows), p["query"].shape, p["key"].shape[1]

    def head(t, kernel, turned):
        x = rows[t] @ kernel
        if turned:
            for i in range(H // 2):
                z = complex(x[i], x[i + H // 2]) * np.exp(1j * t / 10000 ** (2 * i / H))
                x[i], x[i + H // 2] = z.real, z.imag
        return x

    outputs = [np.zeros(p["out"].shape[2]) for _ in rows]
    for n in range(N):
        group = n // (N // K)
        q = [head(t, p["query"][:, n], rotary) for t in range(T)]
        k = [head(t, p["key"][:, group], rotary) for t in range(T)]
        v = [head(t, p["value"][:, group], False) for t in range(T)]
        for t in range(T):
            seen = [s for s in range(T) if valid[s] and (not causal or s <= t)]
            weights = np.exp([q[t] @ k[s] / math.sqrt(H) for s in seen])
            outputs[t] += sum((w * v[s] for w, s in zip(weights / weights.sum(), seen)), np.zeros(H)) @ p["out"][n]
    return outputs


def feed_forward(p, x):
    up = x @ p["up"]
    if "gate" in p:
        gate = x @ p["gate"]
        return (gate / (1 + np.exp(-gate)) * up) @ p["down"]
    return p["act"](up) @ p["down"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def encode(p, tokens, c, causal, valid):
    D = c.D
    rows = []
    for t, token in enumerate(tokens):
        x = p["embedding"]["tokens"][token] * math.sqrt(D)
        wave = np.array([(math.sin, math.cos)[d % 2](t / 10000 ** (2 * (d // 2) / D)) for d in range(D)])
        if c.positions == "learned":
            x = x + p["embedding"]["positions"][t] * math.sqrt(D)
        if c.positions == "sinusoidal":
            x = x + wave
        if c.positions == "sinusoidal_concat":
            x = np.concatenate([x, wave]) @ p["embedding"]["mix"]
        rows.append(x)
    for layer in range(c.layers):
        block = p["blocks"][layer]
        one, pre = block["attention_norm"], c.norm_position == "pre"
        mixed = attention(block["mixer"], [norm(one, x) for x in rows] if pre else rows, causal, valid, c.positions == "rotary")
        rows = [x + m if pre else norm(one, x + m) for x, m in zip(rows, mixed)]
        if c.ffn == "none":
            assert not {"ffn", "ffn_norm"} & block.keys()
            continue
        ffn, two = block["ffn"] | {"act": gelu if c.ffn == "gelu" else lambda x: np.maximum(x, 0)}, block["ffn_norm"]
        rows = [x + feed_forward(ffn, norm(two, x)) if pre else norm(two, x + feed_forward(ffn, x)) for x in rows]
    return np.stack([norm(p["final_norm"], x) for x in rows] if c.norm_position == "pre" else rows)


CASES = {
    "pre-layernorm-gelu-learned": dict(causal=True),
    "pre-rmsnorm-swiglu-rotary": dict(norm="rmsnorm", ffn="swiglu", positions="rotary", causal=True, K=2, N=4),
    "post-layernorm-relu-sinusoidal": dict(norm_position="post", ffn="relu", positions="sinusoidal", tie_embeddings=False),
    "post-rmsnorm-gelu-concat": dict(norm="rmsnorm", norm_position="post", positions="sinusoidal_concat", H=3, F=5),
    "pre-attention-alone": dict(ffn="none", causal=True),
    "post-attention-alone": dict(ffn="none", norm_position="post", norm="rmsnorm"),
    "pooled-mean": dict(per_token=False, num_outputs=3),
    "pooled-first": dict(per_token=False, num_outputs=3, pool="first", positions="none"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_equal_those_of_plain_numpy(build, tokens, case):
    model = build("full", **case)
    # Fresh parameters hide mistakes: scales are one, biases zero. So everything is moved.
    graph, params = nnx.split(model, nnx.Param)
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(params))
    rng = np.random.default_rng(1)
    moved = jax.tree.unflatten(tree, [np.asarray(x) + 0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])
    nnx.replace_by_pure_dict(params, jax.tree.map(jnp.asarray, moved))
    model = nnx.merge(graph, params)

    inputs = tokens(2, 9)
    valid = np.arange(9) < np.array([[9], [6]])
    logits = jax.jit(lambda x, valid: model(x, valid_BT=valid))(inputs, jnp.asarray(valid))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), moved)
    readout = p.get("readout", p["embedding"]["tokens"][: model.num_outputs])
    for b in range(2):
        rows = encode(p, inputs[b], model.config, case.get("causal", False), valid[b])
        if model.per_token:
            np.testing.assert_allclose(logits[b][valid[b]], (rows @ readout.T)[valid[b]], atol=2e-5)
        else:
            pooled = rows[valid[b]].mean(axis=0) if model.config.pool == "mean" else rows[0]
            np.testing.assert_allclose(logits[b], readout @ pooled, atol=2e-5)
