"""Ours and theirs on the same numbers: the outputs, and the gradients with respect to every argument."""

import jax
import jax.numpy as jnp
import numpy as np

from peers import peer

torch = peer("torch")

ATOL = 1e-4


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers in float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def agree(ours, theirs, *args: np.ndarray, rows_BT: np.ndarray | None = None) -> None:
    """Asserts that ours(*JAX arrays) and theirs(*tensors), both [B, T, ...], agree to ATOL, as do the gradients of a random weighting of them.

    rows_BT: the rows to compare where not all are of interest (padding); the others weigh nothing in the gradients either.
    """
    tensors = [torch.tensor(x, requires_grad=True) for x in args]
    o_theirs = theirs(*tensors)
    weights = normal(*o_theirs.shape, seed=1)
    rows_BT = np.ones(o_theirs.shape[:2], bool) if rows_BT is None else rows_BT
    weights[~rows_BT] = 0
    # Rows that are not compared may hold NaN, which a weight of zero would pass on to the gradients.
    compared = o_theirs[torch.tensor(rows_BT)]
    gradients_theirs = [x.numpy() for x in torch.autograd.grad((compared * torch.tensor(weights[rows_BT])).sum(), tensors)]

    def run(*args):
        o, pull = jax.vjp(ours, *args)
        return o, pull(jnp.asarray(weights))

    # Compiled without LLVM's optimizations, in half the time.
    o, gradients = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})(*map(jnp.asarray, args))
    assert o.shape == o_theirs.shape
    np.testing.assert_allclose(np.asarray(o)[rows_BT], compared.detach(), rtol=0, atol=ATOL, err_msg="outputs")
    for n, (gradient, theirs_n) in enumerate(zip(gradients, gradients_theirs, strict=True)):
        assert np.abs(theirs_n).max() > 0, f"argument {n} does not matter"
        np.testing.assert_allclose(gradient, theirs_n, rtol=0, atol=ATOL, err_msg=f"gradient of argument {n}")


def linear(layer):
    """A torch.nn.Linear as a function of JAX arrays, with its weights copied."""
    weight, bias = jnp.asarray(layer.weight.detach()), 0.0 if layer.bias is None else jnp.asarray(layer.bias.detach())
    return lambda x: x @ weight.T + bias


def split_heads(x_BTD, num_heads: int):
    """[B, T, N H] -> [B, T, N, H]."""
    return x_BTD.reshape(*x_BTD.shape[:2], num_heads, -1)


def merge_heads(x_BTNH):
    """[B, T, N, H] -> [B, T, N H]."""
    return x_BTNH.reshape(*x_BTNH.shape[:2], -1)


def heads_first(run):
    """A PyTorch function of [B, N, T, H] tensors as one of [B, T, N, H]."""
    return lambda *tensors: run(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)
