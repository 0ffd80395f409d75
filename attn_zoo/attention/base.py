"""The contract of a variant, and the layer every model puts it in.

Letters, those of jax.nn.dot_product_attention, as suffixes of array names:
B batch, T query positions, S key/value positions, N query heads, K key/value heads (N % K == 0), G = N / K,
H head dim, D model dim, F feed-forward dim, V vocabulary, W window, C blocks, R rank / features / memory slots.
"""

import contextvars
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Bool, Float, Key

from attn_zoo.ops import backends
from attn_zoo.ops.patterns import FULL, Pattern
from attn_zoo.spec import Unsupported, UserError

_ASKED: contextvars.ContextVar[list | None] = contextvars.ContextVar("asked", default=None)  # where calls of `part` are noted instead


@dataclasses.dataclass(frozen=True)
class Paper:
    """Where a variant comes from; `key` is its BibTeX key, `venue` what stands behind the year in cite.bib."""

    key: str
    title: str
    authors: str  # "Last, First and Last, First", as BibTeX has it
    year: int
    venue: str


@dataclasses.dataclass(frozen=True)
class Dims:
    """What a variant is built for: heads, sizes, masks, precision and backend."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_len: int
    causal: bool
    dtype: Any = jnp.float32
    backend: str = "auto"
    padding: str = "any"  # where keys that are not valid may stand: any, or at the end


@dataclasses.dataclass(frozen=True)
class Bound:
    """For a variant that no options make exact: how far from `full` it may be, and in how different a direction, when keys are scaled by `scale`, and why."""

    why: str
    scale: float
    error: float  # largest absolute difference, for standard normal queries, keys (before scaling) and values
    cosine: float = 0.99  # least, between all outputs and those of `full`: an error alone may be that of zeros, or of a mean of the values
    options: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Variant:
    """A registry entry. `causal`, `cross` and `decode` are True, or the reason why not.

    `decode`: whether generation has an incremental form; without one, each step feeds the sequence again.
    """

    name: str
    family: str
    options: type
    build: Callable[..., "Attention"]  # (options, dims, *, shared, rngs) -> Attention
    paper: Paper
    complexity: str
    flops: Callable[..., float]  # (options, B, T, S, N, H, causal): forward, useful pairs only
    time_order: float  # in T, at the default options
    memory_order: float
    exact_when: Callable[[int], dict[str, Any] | None]  # options under which it equals `full` at T, or None: then `bound` holds
    bound: Bound | None = None
    causal: bool | str = True
    cross: bool | str = True
    decode: bool | str = "no incremental form is built"
    state_order: float = 1.0  # of a decoder's state, in T, at the default options
    foresight: str = ""  # causal in its gradients, an output may still depend on later positions through a choice; how. Then steps differ from the parallel form


Cache = dict[str, Any]  # a decoder's state: 't', how many positions it has seen, and arrays that lead with B, a row a sequence; parts may have caches of their own


class Loss(nnx.Intermediate):
    """A loss term that a layer adds to the training objective; the train step sums all it finds."""


class Drawn(nnx.Variable):
    """State that a call draws anew (random features). Where a batch is split over devices, other state is their mean, this the draw of the first."""


class ScoreFunction(nnx.Intermediate):
    """Log-probabilities [B] of what a layer sampled for each example, or a scalar zero where it sampled nothing.

    The train step adds (loss of the example - baseline) d log p to the gradient, which makes it that of the expected loss (Williams 1992, REINFORCE).
    """


class Statistic(nnx.Intermediate):
    """A number or small array worth recording (learned spans, realized compute); the train step carries it to the record."""


def leave(module: nnx.Module, name: str, value: Array) -> None:
    """Sets the variable `name` of a layer (a Loss, a Statistic, state that is updated) during a call.

    A layer that a JAX transformation closes over, instead of merging it inside, is a pure function there and leaves nothing.
    """
    try:
        # A new variable, since the old one may belong to an outer trace (merged from closed-over state) where it cannot change.
        setattr(module, name, getattr(module, name).replace(value))
    except TraceContextError:
        return


class Attention(nnx.Module):
    """One attention variant, built for its dims. Subclasses define `attend` and `attend_reference`."""

    variant: Variant  # its registry entry, set by make_attention
    shares_query_key = False  # True: the layer makes no key projection, and keys are the queries
    pools_queries = False  # True: an output depends on other queries too; invalid ones arrive as zeros, and `attend` takes valid_BT
    has_parts = False  # True: softmax attention is computed by `part` alone, and every backend that gives a logsumexp serves
    wide_parts = False  # True: it gives `part` float32, whatever its own dtype
    gradients_without_key = True  # False: without a random key, queries and keys get no gradient
    anywhere = False  # True: without a causal mask, permuted queries give permuted outputs, so that a decoder may ask one at a time

    def __init__(self, options: Any, dims: Dims):
        self.options = options
        self.dims = dims

    def __call__(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        *,
        valid_BS: Bool[Array, "B S"] | None = None,
        valid_BT: Bool[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T N H"]:
        """Attention of queries over the valid keys, in the queries' dtype.

        `key` is the random key of this call; None means deterministic evaluation. A row without any valid key is zero. `valid_BT`, which
        queries are valid, matters only to a variant that pools queries; by default it is `valid_BS` where T = S, else all are.
        """
        return self._run(self.attend, q_BTNH, k_BSKH, v_BSKH, valid_BS, valid_BT, key)

    def reference(self, q_BTNH, k_BSKH, v_BSKH, *, valid_BS=None, valid_BT=None, key=None) -> Float[Array, "B T N H"]:
        """The slow truth: the same parameters and arguments, computed in float32 as the paper writes it."""
        f32 = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q_BTNH, k_BSKH, v_BSKH)]
        return self._run(self.attend_reference, *f32, valid_BS, valid_BT, key)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        """The fast form. Keys and values at invalid positions arrive as zeros. With `pools_queries` it also takes `valid_BT`, by name."""
        raise NotImplementedError

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        """The slow form, on float32 arguments."""
        raise NotImplementedError

    @property
    def rowwise(self) -> bool:
        """Whether an output depends on no query but its own, as cross-attention in a decoder must."""
        return not self.pools_queries

    @property
    def cross(self) -> bool | str:
        """Whether it can attend from one sequence to another: True, or the reason why not."""
        return self.variant.cross

    def check_cross(self) -> None:
        """Raises Unsupported for what cannot attend from a decoder to an encoder, of whatever lengths."""
        if self.cross is not True:
            raise Unsupported(f"{self.variant.name} cannot attend across sequences: {self.cross}")
        if not self.rowwise:
            raise Unsupported(f"{self.variant.name} cannot attend from a decoder to an encoder: an output depends on the other queries, later targets among them")
        if self.dims.causal:
            raise Unsupported(f"{self.variant.name} was built with a causal mask; a decoder reads an encoder with causal=False")

    def init_cache(self, B: int, max_len: int) -> Cache:
        """The state before the first of at most `max_len` steps. Raises Unsupported unless the attention is causal.

        This one, for variants without an incremental form, keeps all queries, keys (unless these are the queries) and values.
        """
        self.check_decoding(max_len)
        d = self.dims
        same = self.shares_query_key and d.num_kv_heads == d.num_heads
        heads = {"q": d.num_heads} | ({} if same else {"k": d.num_kv_heads}) | {"v": d.num_kv_heads}
        return {name: jnp.zeros((B, max_len, n, d.head_dim), d.dtype) for name, n in heads.items()} | {"t": jnp.zeros((), jnp.int32)}

    def step(
        self, q_B1NH: Float[Array, "B 1 N H"], k_B1KH: Float[Array, "B 1 K H"], v_B1KH: Float[Array, "B 1 K H"], cache: Cache
    ) -> tuple[Float[Array, "B 1 N H"], Cache]:
        """(the output at position cache['t'], the state after it): one position of what the parallel form computes, in evaluation.

        This one feeds the sequence again, as far as it goes.
        """
        t = cache["t"]
        given = {"q": q_B1NH, "k": k_B1KH, "v": v_B1KH}
        fed = {name: jax.lax.dynamic_update_slice_in_dim(cache[name], x.astype(cache[name].dtype), t, 1) for name, x in given.items() if name in cache}
        q = fed["q"]
        valid_BT = jnp.broadcast_to(jnp.arange(q.shape[1]) <= t, q.shape[:2])
        o_BTNH = self(q, fed.get("k", q), fed["v"], valid_BS=valid_BT)
        return jax.lax.dynamic_slice_in_dim(o_BTNH, t, 1, 1), fed | {"t": t + 1}

    def init_cross_cache(self, k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K H"], max_len: int, *, valid_BS: Bool[Array, "B S"] | None = None) -> Cache:
        """The state of cross-attention from at most `max_len` queries, one after the other, to these keys. Raises Unsupported as `check_cross`, UserError for what is longer than it was built for."""
        self.check_cross()
        longest = max(max_len, k_BSKH.shape[1])
        if longest > self.dims.max_len:
            raise UserError(f"length {longest} is over max_len={self.dims.max_len} that this attention was built for")
        valid_BS = jnp.ones(k_BSKH.shape[:2], bool) if valid_BS is None else valid_BS
        k_BSKH, v_BSKH = (jnp.where(valid_BS[:, :, None, None], x, 0) for x in (k_BSKH, v_BSKH))  # as in a call
        return self.cross_state(k_BSKH, v_BSKH, valid_BS, max_len) | {"t": jnp.zeros((), jnp.int32)}

    def cross_state(self, k_BSKH, v_BSKH, valid_BS, max_len: int) -> Cache:
        """What `cross_step` needs beside 't'. This one keeps keys and values and, where a query's position has a meaning, room for all queries."""
        d = self.dims
        queries = {} if self.anywhere else {"q": jnp.zeros((len(k_BSKH), max_len, d.num_heads, d.head_dim), d.dtype)}
        return {"k": k_BSKH, "v": v_BSKH, "valid": valid_BS} | queries

    def cross_step(self, q_B1NH: Float[Array, "B 1 N H"], cache: Cache) -> tuple[Float[Array, "B 1 N H"], Cache]:
        """(row cache['t'] of cross-attention, the state after it). Where the query's position has a meaning, all queries so far are fed again."""
        t = cache["t"]
        attend = lambda q: self(q, cache["k"], cache["v"], valid_BS=cache["valid"], valid_BT=jnp.ones(q.shape[:2], bool))
        if self.anywhere:
            return attend(q_B1NH), cache | {"t": t + 1}
        q_BTNH = jax.lax.dynamic_update_slice_in_dim(cache["q"], q_B1NH.astype(cache["q"].dtype), t, 1)
        o_BTNH = attend(q_BTNH)
        return jax.lax.dynamic_slice_in_dim(o_BTNH, t, 1, 1), cache | {"q": q_BTNH, "t": t + 1}

    def check_decoding(self, max_len: int) -> None:
        """Raises Unsupported unless this attention is causal, UserError where it was built for less than `max_len`."""
        if not self.dims.causal:
            raise Unsupported(f"{self.variant.name} was built without a causal mask; a decoder generates with causal=True")
        if max_len > self.dims.max_len:
            raise UserError(f"max_len={max_len} is over the max_len={self.dims.max_len} that this attention was built for")

    def leave(self, name: str, value: Array) -> None:
        """Sets the variable `name` of this layer, as `leave` does."""
        leave(self, name, value)

    def part(self, q_BTNH, k_BSKH, v_BSKH, *, pattern: Pattern, valid_BS=None) -> tuple[Array, Array]:
        """(output, logsumexp) of softmax attention over the pairs of `pattern`, on this layer's backend: a part to be merged with others."""
        asked = _ASKED.get()
        if asked is not None:
            asked.append((pattern, q_BTNH.shape, k_BSKH.shape))
            return jnp.zeros_like(q_BTNH), jnp.zeros(q_BTNH.shape[:3])
        backend = self.backend(valid_BS is not None)
        return backends.attention_and_logsumexp(q_BTNH, k_BSKH, v_BSKH, pattern=pattern, valid_BS=valid_BS, backend=backend)

    def asked_parts(self, T: int, S: int) -> list[tuple[Pattern, tuple[int, ...], tuple[int, ...]]]:
        """The calls of `part` for one sequence: (pattern, shape of q, shape of k) each, of folded sequences and chosen keys as they come. Computes nothing."""
        d, asked = self.dims, []
        q, k = (jax.ShapeDtypeStruct((1, length, heads, d.head_dim), d.dtype) for length, heads in ((T, d.num_heads), (S, d.num_kv_heads)))
        token = _ASKED.set(asked)
        try:
            jax.eval_shape(lambda q, k, v: self.attend(q, k, v, None, None), q, k, k)
        finally:
            _ASKED.reset(token)
        return asked

    def backend(self, masked: bool = False) -> str:
        """The backend that runs, given whether key validity is passed. Raises UserError if dims.backend names one that cannot serve."""
        if self.has_parts:
            dtype = jnp.promote_types(self.dims.dtype, jnp.float32) if self.wide_parts else self.dims.dtype
            return backends.choose(self.dims.backend, FULL, dtype, self.dims.head_dim, masked=masked, logsumexp=True)
        if self.dims.backend not in ("auto", "xla"):
            raise UserError(f"attention.backend={self.dims.backend!r} does not serve {self.variant.name}; use auto or xla")
        return "xla"

    def beside(self, backend: str) -> str:
        """What computes, beside `backend`'s scores and sums, what there are kernels for in other cases: features, lists of keys, an inverse, a choice.

        `backend` itself where it does, and where XLA does it on every backend (projections, other feature maps, sorting, clustering).
        """
        return backend

    def engines(self, masked: bool = False) -> str:
        """All that run, for the record: `backend`, and after a plus what runs beside it."""
        backend = self.backend(masked)
        return " + ".join(dict.fromkeys((backend, self.beside(backend))))

    def plan(self, T: int, S: int, masked: bool = False) -> dict[str, Any]:
        """What will run at these sizes, for the record: {'backend': all that run, and e.g. block sizes and densities}."""
        return {"backend": self.engines(masked)}

    def flops(self, B: int, T: int, S: int) -> float:
        """Forward FLOPs over useful pairs, as the layer stands now."""
        return self.variant.flops(self.options, B, T, S, self.dims.num_heads, self.dims.head_dim, self.dims.causal)

    @property
    def specializes(self) -> bool:
        """Whether `specialize` does anything: then every training step is waited for."""
        return type(self).specialize is not Attention.specialize

    def specialize(self) -> None:
        """Re-derives what is static from the current parameter values (e.g. the window that learned spans need).

        Called outside jit between steps; the step is compiled again only when the result differs.
        """

    def _run(self, attend, q_BTNH, k_BSKH, v_BSKH, valid_BS, valid_BT, key):
        B, T, N, H = q_BTNH.shape
        S = k_BSKH.shape[1]
        d = self.dims
        if (N, k_BSKH.shape[2], H) != (d.num_heads, d.num_kv_heads, d.head_dim):
            raise UserError(f"built for N={d.num_heads}, K={d.num_kv_heads}, H={d.head_dim}; got q {q_BTNH.shape}, k {k_BSKH.shape}")
        if max(T, S) > d.max_len:
            raise UserError(f"length {max(T, S)} is over max_len={d.max_len} that this attention was built for")
        if T != S and self.cross is not True:
            raise Unsupported(f"{self.variant.name} cannot attend across sequences (T={T}, S={S}): {self.cross}")
        self.backend(masked=valid_BS is not None)
        if self.pools_queries:
            valid_BT = valid_BS if valid_BT is None and T == S else valid_BT
            attend = functools.partial(attend, valid_BT=valid_BT)
            if valid_BT is not None:
                q_BTNH = jnp.where(valid_BT[:, :, None, None], q_BTNH, 0)
        if valid_BS is None:
            return attend(q_BTNH, k_BSKH, v_BSKH, None, key).astype(q_BTNH.dtype)
        valid_BS = jnp.broadcast_to(valid_BS, (B, S))  # kernels read it as it stands
        # Whatever stands in invalid positions (even NaN) must change nothing: 0 * NaN is NaN, so it is replaced, not weighted away.
        k_BSKH, v_BSKH = (jnp.where(valid_BS[:, :, None, None], x, 0) for x in (k_BSKH, v_BSKH))
        o_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, valid_BS, key)
        return jnp.where(valid_BS.any(axis=1)[:, None, None, None], o_BTNH, 0).astype(q_BTNH.dtype)


def repeat_kv(x_BSKH: Array, num_heads: int) -> Array:
    """Key/value heads repeated for the query heads that share them, [B S N H]: for references, and where every query head chooses its own keys."""
    return jnp.repeat(x_BSKH, num_heads // x_BSKH.shape[2], axis=2)


def softmax_reference(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Array | np.ndarray, bias: Array | np.ndarray | float = 0.0, scale: float | None = None) -> Array:
    """Dense masked softmax attention, the truth that every scored variant is held to. Vaswani et al. 2017, eq. 1.

    mask broadcasts to [B, N, T, S]; bias is added to the scaled scores. A row that sees no key gives zeros.
    """
    N, H = q_BTNH.shape[2:]
    k_BSNH, v_BSNH = repeat_kv(k_BSKH, N), repeat_kv(v_BSKH, N)
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, precision="highest") * (H**-0.5 if scale is None else scale) + bias
    scores_BNTS = jnp.where(mask, scores_BNTS, -jnp.inf)
    top_BNT1 = jnp.max(scores_BNTS, axis=-1, keepdims=True)
    weights_BNTS = jnp.where(mask, jnp.exp(scores_BNTS - jnp.where(jnp.isfinite(top_BNT1), jax.lax.stop_gradient(top_BNT1), 0.0)), 0.0)
    total_BNT1 = weights_BNTS.sum(axis=-1, keepdims=True)
    weights_BNTS = weights_BNTS / jnp.where(total_BNT1 == 0, 1.0, total_BNT1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH, precision="highest")


def require(variant: Variant, causal: bool) -> None:
    """Raises Unsupported with the variant's own reason when it cannot be causal."""
    if causal and variant.causal is not True:
        raise Unsupported(f"{variant.name} cannot be causal: {variant.causal}")
