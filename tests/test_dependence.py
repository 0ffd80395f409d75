"""Chains of loop trips and the reach of layers, of computations where both are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import make_attention
from attn_zoo.dependence import longest_chain, positions_reached

X = jnp.arange(1.0, 7.0)
scan = lambda x: jax.lax.scan(lambda total, x: (total + x, total * x), 0.0, x)
double = jax.custom_vjp(lambda x: 2 * scan(x)[1])
double.defvjp(lambda x: (double(x), ()), lambda _, do: (2 * do,))

CHAINS = {
    "no_loop": (lambda x: jnp.cumsum(x) @ x, 0),
    "map": (lambda x: jax.lax.map(jnp.sin, x), 0),
    "recurrence": (scan, 6),
    "recurrence_reversed": (lambda x: jax.lax.scan(lambda total, x: (total + x, None), 0.0, x, reverse=True)[0], 6),
    "one_after_the_other": (lambda x: scan(scan(x)[1]), 12),
    "side_by_side": (lambda x: scan(x)[0] + scan(2 * x)[0], 6),
    "map_of_recurrences": (lambda x: jax.lax.map(lambda y: scan(y * x)[0], x), 6),
    "recurrence_of_recurrences": (lambda x: jax.lax.scan(lambda total, y: (total + scan(y * total * x)[0], None), 1.0, x)[0], 42),
    "as_many_as_the_data_say": (lambda x: jax.lax.fori_loop(0, x[3].astype(int), lambda i, total: total + x[i], 0.0), 4),
    "branch_taken": (lambda x: jax.lax.cond(x[0] > 0, lambda x: scan(x)[0], lambda x: x[0], x), 6),
    "branch_not_taken": (lambda x: jax.lax.cond(x[0] < 0, lambda x: scan(x)[0], lambda x: x[0], x), 0),
    "inside_other_calls": (jax.jit(jax.checkpoint(lambda x: scan(double(x))[0])), 12),
    "unused": (lambda x: (scan(x), x + 1)[1], 0),
}


@pytest.mark.parametrize("function, expected", CHAINS.values(), ids=CHAINS)
def test_the_longest_chain(function, expected):
    assert longest_chain(function, X) == expected


def test_values_along_the_way_are_right():
    """A loop whose length depends on what another loop made."""

    def collatz(x):
        start = scan(x)[0].astype(int)  # 21, which takes 7 trips
        return jax.lax.while_loop(lambda n: n > 1, lambda n: jnp.where(n % 2, 3 * n + 1, n // 2), start)

    assert longest_chain(collatz, X) == 6 + 7


def test_attention_has_no_chain_as_defined_and_one_of_blocks_as_computed():
    attention = make_attention("full", num_heads=1, head_dim=4, max_len=1100, causal=True, backend="xla")
    q = jnp.ones((1, 1100, 1, 4))
    assert longest_chain(attention.reference, q, q, q) == 0
    # The blocks of 512 keys that the last query sees; the blocks of queries, and the one group of heads, whose loops write into one array.
    assert longest_chain(attention, q, q, q) == 3 + 3 + 1


def test_positions_reached():
    T, D = 20, 3
    back = np.arange(T)[:, None] - np.arange(T)
    shifted = lambda x: x + jnp.pad(x, ((0, 0), (5, 0), (0, 0)))[:, :T]
    np.testing.assert_array_equal(positions_reached(shifted, T, D), (back == 0) | (back == 5))
    decaying = lambda x: jax.lax.scan(lambda h, x: (0.01 * h + x,) * 2, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[1].swapaxes(0, 1)
    np.testing.assert_array_equal(positions_reached(decaying, T, D), back >= 0)
    local = make_attention("local(window=4)", num_heads=1, head_dim=D, max_len=T)
    np.testing.assert_array_equal(positions_reached(lambda x: local(*(x[:, :, None],) * 3)[:, :, 0], T, D), abs(back) <= 4)
