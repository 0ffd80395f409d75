"""How noisy the score-function estimator of hard attention is, with and without the moving baseline."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention import ScoreFunction
from attn_zoo.tasks.base import Batch
from attn_zoo.train import Model, State, baseline_of


def samples(model: Model) -> bool:
    """Whether layers of the model learn by the score of what they sample."""
    return bool(jax.tree.leaves(nnx.state(model.abstract, ScoreFunction)))


def variance(model: Model, state: State, batch: Batch, draws: int = 64) -> dict[str, Any]:
    """Total variance over draws of the score term's gradient, summed over all parameters, of one batch: what is sampled differs, nothing else but dropout.

    {draws, batch, baseline (nats a target), with_baseline, without_baseline, mean_norm}. Both use the same samples, at the state's parameters and moving
    baseline; the gradients are of the mean over targets, (nats a target)^2. mean_norm is the squared norm of the mean gradient with baseline. The baseline
    leaves the expectation as it is, since the score has mean zero (Williams 1992, theorem 1; Xu et al. 2015, sec. 4.1).
    """
    state = jax.device_put({name: state[name] for name in ("params", "rest", "baseline", "key", "step")}, jax.local_devices()[0])
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"]), draws)
    baselines = jnp.stack([baseline_of(state), jnp.zeros(())])

    def gradient(params, rest, batch, key, baseline):
        def score(params):
            sums, _ = model.sums(params, rest, batch, key, baseline)
            return sums["score"] / sums["weight"]

        return jax.grad(score)(params)

    @jax.jit
    def add(total, square, params, rest, batch, key, baseline):
        drawn = gradient(params, rest, batch, key, baseline)
        return jax.tree.map(jnp.add, total, drawn), square + squared_norm(drawn)

    def moments(baseline):
        """(squared norm of the mean, variance), a draw a call: inside a scan XLA's convolutions are many times slower on a CPU."""
        total, square = jax.tree.map(jnp.zeros_like, state["params"]), jnp.zeros(())
        for key in keys:
            total, square = jax.block_until_ready(add(total, square, state["params"], state["rest"], batch, key, baseline))
        mean = squared_norm(jax.tree.map(lambda x: x / draws, total))
        return mean, (square - draws * mean) / (draws - 1)

    (mean, with_baseline), (_, without) = map(moments, baselines)
    spread = {"with_baseline": float(with_baseline), "without_baseline": float(without), "mean_norm": float(mean)}
    return {"draws": draws, "batch": len(batch["inputs"]), "baseline": float(baselines[0])} | spread


def squared_norm(tree: Any) -> jax.Array:
    """The sum of squares of all numbers."""
    return sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree))
