"""What waits for what in a computation: its longest chain of loop trips, and which positions of its output depend on which of its input."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

CALLS = {"jit", "closed_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}  # they run one jaxpr, once
Waited = tuple[Callable[[], Any], int]  # a value, computed when it is asked for, and the longest chain of trips that it waited for


def longest_chain(function: Callable, *args: Any) -> int:
    """The most loop trips in function(*args) that each wait for the one before; 0 where none does.

    The jaxpr is followed operation by operation, and with each value goes the longest chain that it waited for. A trip of a while loop, or of a scan that
    carries something on, adds one to what comes out of it: a recurrence over T positions is a chain of T, and a map, whose trips know nothing of each other, is
    none; nor is a call of a kernel, whatever loops it has inside. Of the values themselves only those are computed that say how often a loop runs, or which
    branch is taken.
    """
    closed = jax.make_jaxpr(lambda *args: function(*args))(*args)  # anew: JAX would remember what a module was when it was traced before
    return max((chain for _, chain in _run(closed, [_known(leaf) for leaf in jax.tree.leaves(args)])), default=0)


def _known(value: Any, chain: int = 0) -> Waited:
    return lambda: value, chain


def _run(closed: Any, args: list[Waited]) -> list[Waited]:
    jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    known = dict(zip(jaxpr.invars, args)) | {var: _known(const) for var, const in zip(jaxpr.constvars, consts)}
    read = lambda var: _known(var.val) if isinstance(var, Literal) else known[var]
    for equation in jaxpr.eqns:
        run = {"scan": _scan, "while": _while, "cond": _cond}.get(equation.primitive.name, _call if equation.primitive.name in CALLS else _operation)
        known.update(zip(equation.outvars, run(equation, [read(var) for var in equation.invars])))
    return [read(var) for var in jaxpr.outvars]


def _operation(equation: Any, args: list[Waited]) -> list[Waited]:
    @functools.cache
    def values():
        out = equation.primitive.bind(*(value() for value, _ in args), **equation.params)
        return out if equation.primitive.multiple_results else [out]

    chain = max((chain for _, chain in args), default=0)
    return [(functools.partial(lambda n: values()[n], n), chain) for n in range(len(equation.outvars))]


def _call(equation: Any, args: list[Waited]) -> list[Waited]:
    return _run(equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"], args)


def _cond(equation: Any, args: list[Waited]) -> list[Waited]:
    (index, chain), *args = args
    return [(value, max(own, chain)) for value, own in _run(equation.params["branches"][int(index())], args)]


def _scan(equation: Any, args: list[Waited]) -> list[Waited]:
    p = equation.params
    # How many constants and carried values there are, which JAX says in another way from 0.12 on.
    num_consts, num_carry = (p["num_consts"], p["num_carry"]) if "num_consts" in p else map(len, p["ft_in"].unpack()[:2])
    consts, carry, xs = args[:num_consts], args[num_consts : num_consts + num_carry], args[num_consts + num_carry :]
    waits = 1 if carry else 0
    trips: list = [None] * p["length"]
    for i in reversed(range(p["length"])) if p["reverse"] else range(p["length"]):
        slices = [(functools.partial(lambda x, i: x()[i], x, i), chain) for x, chain in xs]
        out = [(value, chain + waits) for value, chain in _run(p["jaxpr"], consts + carry + slices)]
        carry, trips[i] = out[:num_carry], out[num_carry:]
    stack = lambda values: functools.cache(lambda: jnp.stack([value() for value in values]))
    return carry + [(stack([value for value, _ in out]), max(chain for _, chain in out)) for out in zip(*trips)]


def _while(equation: Any, args: list[Waited]) -> list[Waited]:
    p = equation.params
    first, last = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    cond_consts, body_consts, carry = args[:first], args[first:last], args[last:]
    while True:
        ((another, decided),) = _run(p["cond_jaxpr"], cond_consts + carry)
        if not another():
            return carry
        carry = [(value, max(chain, decided) + 1) for value, chain in _run(p["body_jaxpr"], body_consts + carry)]


def positions_reached(layer: Callable, T: int, D: int) -> np.ndarray:
    """Which outputs of a layer [B, T, D] -> [B, T, D] depend on which inputs, bool [T, T], by whether gradients at a random input are zero.

    A dependence too faint for float32 (a gradient below 1e-53 of the strongest that was asked for) counts as none.
    """
    x_TTD = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (T, D)), (T, T, D))  # a copy for each output that is asked for
    weights_D = 1e15 * jax.random.normal(jax.random.key(1), (D,))  # large, since gradients vanish along a recurrence
    asked_TTD = jnp.eye(T)[:, :, None] * weights_D
    gradient_TTD = jax.jit(lambda x, asked: jax.vjp(layer, x)[1](asked)[0])(x_TTD, asked_TTD)
    return (np.asarray(gradient_TTD) != 0).any(axis=-1)
