"""What core_bench.py times: every variant, what jax_peers.py has, and by processes of its own the attention of PyTorch; each as a row with the same two methods.

A candidate's `prepare(mode)` compiles and calls it once and says how long that took; its `seconds(mode, calls)` is the time of one call, the mean of so many.
"""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo import make_attention
from attn_zoo.attention import parse_variant, variant_text
from attn_zoo.measure import compile_timed, out_of_memory
from attn_zoo.models.multi_head import MultiHeadAttention
from attn_zoo.spec import UserError

FIRST_CALL = threading.Lock()  # rows are compiled side by side, and called alone: memory for one may be all there is
MOST_ERROR = 0.05  # of the largest value: several times what bfloat16 rounds, in results and gradients


class CannotRun(Exception):
    """The reason why there is no time for a row, and the status of its record: it cannot do what was asked, or 'oom', or 'error' for what failed."""

    def __init__(self, reason: str, status: str = "unsupported"):
        super().__init__(reason)
        self.status = status


class Lost(CannotRun):
    """It is that the device, or the process that a row lives in, no longer answers, which may be another row's fault."""

    def __init__(self, reason: str):
        super().__init__(reason, "error")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all candidates of one length share."""

    B: int
    T: int
    N: int
    H: int
    dtype: str
    checked: bool = False  # whether results of variants are held to those of XLA's engine before they are timed

    def attention(self, spec: str, causal: bool, backend: str = "auto"):
        """The variant at these sizes."""
        return make_attention(spec, num_heads=self.N, head_dim=self.H, max_len=self.T, causal=causal, dtype=jnp.dtype(self.dtype), backend=backend)

    def bytes(self, mode: str) -> float:
        """Least traffic: every argument and every result of attention once; q, k, v and o, and with gradients those of q, k, v and o too."""
        return float((4 if mode == "forward" else 8) * self.B * self.T * self.N * self.H * jnp.dtype(self.dtype).itemsize)


class Jax:
    """A function of arrays, compiled by XLA; of the last of them, `given`, no gradients are taken. What it gives is held to `trusted`, where there is one."""

    framework, process, tunes = "jax", None, False

    def __init__(
        self, name: str, function: Callable, args: tuple, *, spec: str, causal: bool, layer: bool | str = False, peer: bool = False, plan: dict | None = None, given: tuple = (),
        trusted: Callable | None = None,
    ):  # fmt: skip
        self._trusted = trusted
        self.name, self.spec, self.causal, self.layer, self.peer, self.plan = name, spec, causal, layer, peer, plan or {}
        self._function, self._args, self._given, self._compiled = function, args, given, {}

    def prepare(self, mode: str) -> dict[str, Any]:
        """{'compile': seconds of lowering and compiling, 'temp_bytes', and 'error' if it is checked}. Raises CannotRun."""
        try:
            call, args = self._call(self._function, mode)
            compiled, seconds = compile_timed(jax.jit(call), *args)
            trusted = self._trusted and jax.jit(self._call(self._trusted, mode)[0]).lower(*args).compile()
            with FIRST_CALL:
                found = jax.block_until_ready(compiled(*args))
                checked = {"error": farthest(found, trusted(*args))} if trusted else {}
        except CannotRun:
            raise
        except Exception as e:  # a row with the reason, whatever it is
            raise failed(e) from None
        if checked and not checked["error"] <= MOST_ERROR:
            raise CannotRun(f"wrong: it differs from what XLA's engine gives by {checked['error']:.2g} of the largest value", "error")
        self._compiled[mode] = compiled, args
        return {"compile": seconds, "temp_bytes": compiled.memory_analysis().temp_size_in_bytes} | checked

    def seconds(self, mode: str, calls: int) -> float:
        """Of one call. Raises CannotRun."""
        compiled, args = self._compiled[mode]
        try:
            start = time.perf_counter()
            for _ in range(calls):
                o = compiled(*args)
            jax.block_until_ready(o)
        except Exception as e:
            raise failed(e) from None
        return (time.perf_counter() - start) / calls

    def _call(self, function: Callable, mode: str) -> tuple[Callable, tuple]:
        """What is compiled of a function, and its arguments."""
        args = *self._args, *self._given
        if mode == "forward":
            return function, args

        def both(args, given, do):
            o, pull = jax.vjp(lambda *args: function(*args, *given), *args)
            return o, pull(do)

        o = jax.eval_shape(function, *args)
        return both, (self._args, self._given, cotangent(o.shape, o.dtype))


def farthest(found: Any, expected: Any) -> float:
    """The largest difference of two results, array by array as a share of the largest value expected."""
    wide = lambda x: x.astype(jnp.float32)
    differ = lambda a, b: jnp.abs(wide(a) - wide(b)).max() / jnp.maximum(jnp.abs(wide(b)).max(), 1e-6)
    return float(jnp.stack(jax.tree.leaves(jax.tree.map(differ, found, expected))).max())


def failed(e: Exception) -> CannotRun:
    """Why a call of JAX gave nothing: by itself, or since nothing runs any more, as after an illegal access to a GPU's memory."""
    try:
        jax.block_until_ready(jnp.zeros(()) + 1)
    except Exception:
        return Lost(f"nothing runs any more on the device: {said(e)}")
    return CannotRun(said(e), status_of(e))


@functools.lru_cache(maxsize=2)  # one for all rows of a length, and one for those that are layers: at T = 65,536 each is as large as the queries
def cotangent(shape: tuple[int, ...], dtype) -> jax.Array:
    """Random, of a result of this shape."""
    return jax.random.normal(jax.random.key(3), shape).astype(dtype)


def status_of(e: Exception) -> str:
    """Of the record of what failed so: 'unsupported' for what is refused, or not installed; 'oom'; else 'error'."""
    if isinstance(e, ExceptionGroup):
        e = e.exceptions[0]
    if isinstance(e, (UserError, NotImplementedError, ImportError)):
        return "unsupported"
    of_torch = "out of memory", "can't allocate memory"  # on a GPU, and on a CPU
    return "oom" if out_of_memory(e) or any(words in str(e) for words in of_torch) else "error"


def said(e: Exception) -> str:
    """The first line of a failure, with its kind; of several, that of the first."""
    if isinstance(e, ExceptionGroup):
        e = e.exceptions[0]
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"[:300]


def heads(problem: Problem) -> tuple:
    """Random q, k, v [B, T, N, H]."""
    shape = problem.B, problem.T, problem.N, problem.H
    return tuple(jax.random.normal(key, shape).astype(problem.dtype) for key in jax.random.split(jax.random.key(0), 3))


def variant(problem: Problem, name: str, spec: str, causal: bool, qkv: tuple, backend: str = "auto") -> Jax:
    """A variant of the zoo between its projections. Its parameters are arguments, as a model's are: what follows from them alone is not computed when it is compiled."""
    attention = problem.attention(spec, causal, backend)
    state = nnx.state(attention)
    try:
        plan = attention.plan(problem.T, problem.T)
    except UserError:  # a backend that cannot serve it: the call says so too, and that becomes the reason of its row
        plan = None
    trusted = problem.attention(spec, causal, "xla") if problem.checked else None
    call = lambda layer: lambda q, k, v, state: nnx.merge(nnx.split(layer)[0], state)(q, k, v)
    return Jax(name, call(attention), qkv, spec=spec, causal=causal, plan=plan, given=(state,), trusted=trusted and call(trusted))


def layer(problem: Problem, name: str, spec: str, causal: bool, projections: bool | str) -> Jax:
    """A variant with its projections, [B, T, N H] to [B, T, N H], or 'inputs', those to queries, keys and values alone; gradients to input and parameters."""
    attention, D = problem.attention(spec, causal), problem.N * problem.H
    module = MultiHeadAttention(attention, D=D, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    params = jax.tree.map(lambda x: x.astype(problem.dtype), params)
    x = jax.random.normal(jax.random.key(0), (problem.B, problem.T, D)).astype(problem.dtype)

    def call(params, x, rest):
        module = nnx.merge(graph, params, rest)
        if projections != "inputs":
            return module(x)
        heads = (jnp.einsum("BTD,DNH->BTNH", x, weights[...]) for weights in (module.query, module.key, module.value))
        return module.attention(*heads).reshape(x.shape)

    return Jax(name, call, (params, x), spec=spec, causal=causal, layer=projections, plan=attention.plan(problem.T, problem.T), given=(rest,))


def counterparts(peers: list, rows: list[Jax], problem: Problem, qkv: tuple) -> list[Jax]:
    """The variants that peers stand beside, with projections where those have them, as far as `rows` lacks them."""
    known = {(row.spec, row.causal, row.layer) for row in rows}
    found = {}
    for peer in peers:
        of = peer.spec, peer.causal, peer.layer
        name = f"{peer.spec}{way(peer.causal)}"
        if of in known or of in found:
            continue
        if peer.layer:
            found[of] = layer(problem, name + (", with its input projections" if peer.layer == "inputs" else ", as a layer"), *of)
        else:
            found[of] = variant(problem, name, peer.spec, peer.causal, qkv)
    return list(found.values())


def plain(spec: str) -> str:
    """A spec in the form that rows are named by."""
    return variant_text(parse_variant(spec))


def way(causal: bool) -> str:
    """What a name says of its direction."""
    return "" if causal else ", bidirectional"


class Ended(UserError):
    """The process of the PyTorch peers is no more."""


class TorchProcess:
    """The process of torch_worker.py, run by `python`, which need not be this one; if it ends of itself, the next length has a new one."""

    def __init__(self, python: str, settings: dict[str, Any], environment: dict[str, str] | None = None):
        self._python, self._settings, self._environment = python, settings, os.environ | (environment or {})
        self._start()

    def _start(self) -> None:
        script, self._errors = Path(__file__).with_name("torch_worker.py"), tempfile.TemporaryFile("w+", errors="replace")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True)
        try:
            self._process = subprocess.Popen([self._python, str(script)], env=self._environment, **pipes)
        except OSError as e:
            raise UserError(f"--peers_python={self._python}: {e.strerror}; it must be a Python that has torch and attn_zoo, as .venv-peers/bin/python") from None
        self.peers = self.ask("list", **self._settings)
        self.about = self.ask("about")

    def ask(self, do: str, **arguments) -> Any:
        """The answer. Raises Ended, with the last that it said."""
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["it said nothing"])[-1]
            raise Ended(f"the process of the PyTorch peers ended with status {status}: {last[:300]} (--peers=none does without)")
        return json.loads(answer)

    def candidates(self, problem: Problem) -> list["Torch"]:
        """All of its peers at one length."""
        try:
            self.ask("open", B=problem.B, T=problem.T)
        except Ended:
            self._start()
            self.ask("open", B=problem.B, T=problem.T)
        return [Torch(self, **peer) for peer in self.peers]

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, with what it was asked last unread
            self._process.stdin.close()
        self._process.wait()


class Torch:
    """A peer that lives in the other process."""

    framework, peer, plan = "torch", True, {}

    def __init__(self, process: TorchProcess, name: str, spec: str, causal: bool, layer: bool | str, tunes: bool, reason: str | None):
        self.name, self.spec, self.causal, self.layer, self.tunes, self._reason, self.process = name, plain(spec), causal, layer, tunes, reason, process

    def prepare(self, mode: str) -> dict[str, Any]:
        """{'compile': seconds of building it and calling it once}. Raises CannotRun."""
        if self._reason:
            raise CannotRun(self._reason)
        answer = self._ask("prepare", name=self.name, mode=mode)
        return {"compile": {"first_call_s": answer["seconds"]}}

    def seconds(self, mode: str, calls: int) -> float:
        """Of one call. Raises CannotRun."""
        return self._ask("time", name=self.name, mode=mode, calls=calls)["seconds"]

    def _ask(self, do: str, **arguments) -> dict:
        try:
            answer = self.process.ask(do, **arguments)
        except Ended as e:
            raise Lost(str(e)) from None
        if "reason" in answer:
            raise CannotRun(answer["reason"], answer["status"])
        return answer
