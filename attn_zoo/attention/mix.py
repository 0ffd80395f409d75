"""A mixture: the heads of one layer divided among several variants, `mix(local(window=64)*6, full*2)`.

Compound patterns as the surveys list them (Lin et al. 2022, sec. 4.1.2): Sparse Transformer and Longformer give some heads one pattern and the
rest another. Counts are shares: with N heads a part of count c gets c N / sum of counts of them, in the order written. A part is built, run, proven and
counted as it would be alone; what one part cannot do, the mixture cannot.
"""

import dataclasses
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.base import Attention, Paper, Variant, repeat_kv
from attn_zoo.spec import Part, Spec, check

DEFAULT = (Part(Spec("local")), Part(Spec("full")))


@dataclasses.dataclass(frozen=True)
class Options:
    """parts: specs, each with its count of shares, written without a name: mix(local*3, full)."""

    parts: tuple[Part, ...] = DEFAULT

    def __post_init__(self):
        from attn_zoo.attention import canonical  # the registry, which holds this variant

        ok = isinstance(self.parts, tuple) and self.parts and all(isinstance(part, Part) for part in self.parts)
        check(ok, "parts", self.parts, "must be specs with counts, as in mix(local(window=64)*6, full*2)")
        object.__setattr__(self, "parts", tuple(Part(canonical(part.spec), part.count) for part in self.parts))


def shares(options: Options, num_heads: int) -> list[int]:
    """Heads of every part. Raises UserError where they do not come out whole."""
    total = sum(part.count for part in options.parts)
    for part in options.parts:
        rule = f"shares of {total} must divide num_heads={num_heads} into whole heads; the counts may be the heads themselves, adding up to {num_heads}"
        check(part.count * num_heads % total == 0, "parts", str(part), rule)
    return [part.count * num_heads // total for part in options.parts]


class Mix(Attention):
    """Parts side by side, each with its own heads."""

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        from attn_zoo.attention import make_attention

        super().__init__(options, dims)
        G = dims.num_heads // dims.num_kv_heads
        ends = list(accumulate(shares(options, dims.num_heads), initial=0))
        self.bounds = tuple(zip(ends, ends[1:]))  # of each part's query heads
        # A part whose query heads come in whole groups takes their key heads; for another, keys are repeated for its query heads.
        self.grouped = tuple(start % G == end % G == 0 for start, end in self.bounds)
        self.parts = nnx.List([])
        for part, (start, end), grouped in zip(options.parts, self.bounds, self.grouped):
            heads = dict(num_heads=end - start, num_kv_heads=(end - start) // (G if grouped else 1), head_dim=dims.head_dim)
            like = dict(max_len=dims.max_len, causal=dims.causal, dtype=dims.dtype, backend=dims.backend, padding=dims.padding)
            self.parts.append(make_attention(part.spec, **heads, **like, shared=shared, rngs=rngs))
        sharing = {part.shares_query_key for part in self.parts}
        check(len(sharing) == 1, "parts", ", ".join(map(str, options.parts)), "variants that use their queries as keys mix only with each other")
        self.shares_query_key = sharing.pop()
        self.pools_queries = any(part.pools_queries for part in self.parts)

    @property
    def rowwise(self):
        return all(part.rowwise for part in self.parts)

    @property
    def cross(self):
        return next((f"{part.variant.name}: {part.cross}" for part in self.parts if part.cross is not True), True)

    @property
    def anywhere(self):
        return all(part.anywhere for part in self.parts)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, valid_BT=None):
        return self._each(lambda part: part, q_BTNH, k_BSKH, v_BSKH, valid_BS, valid_BT, key)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, valid_BT=None):
        return self._each(lambda part: part.reference, q_BTNH, k_BSKH, v_BSKH, valid_BS, valid_BT, key)

    def _each(self, form, q_BTNH, k_BSKH, v_BSKH, valid_BS, valid_BT, key):
        keys = [None] * len(self.parts) if key is None else jax.random.split(key, len(self.parts))
        divided = self.divided(q_BTNH, k_BSKH, v_BSKH)
        outputs = [form(part)(*qkv, valid_BS=valid_BS, valid_BT=valid_BT, key=part_key) for part, qkv, part_key in zip(self.parts, divided, keys)]
        return jnp.concatenate(outputs, axis=2)

    def divided(self, q_BTNH, k_BSKH, v_BSKH):
        """(queries, keys, values) of each part's heads."""
        for (start, end), keys in zip(self.bounds, self.divided_keys(k_BSKH, v_BSKH)):
            yield q_BTNH[:, :, start:end], *keys

    def divided_keys(self, k_BSKH, v_BSKH):
        """(keys, values) of each part's heads."""
        G = self.dims.num_heads // self.dims.num_kv_heads
        for (start, end), grouped in zip(self.bounds, self.grouped):
            take = lambda x: x[:, :, start // G : end // G] if grouped else repeat_kv(x, self.dims.num_heads)[:, :, start:end]
            yield take(k_BSKH), take(v_BSKH)

    def check_cross(self):
        for part in self.parts:
            part.check_cross()

    def cross_state(self, k_BSKH, v_BSKH, valid_BS, max_len):
        """Those of the parts."""
        keys = self.divided_keys(k_BSKH, v_BSKH)
        return {str(n): part.init_cross_cache(k, v, max_len, valid_BS=valid_BS) for n, (part, (k, v)) in enumerate(zip(self.parts, keys))}

    def cross_step(self, q_B1NH, cache):
        outputs, new = [], {"t": cache["t"] + 1}
        for n, (part, (start, end)) in enumerate(zip(self.parts, self.bounds)):
            o, new[str(n)] = part.cross_step(q_B1NH[:, :, start:end], cache[str(n)])
            outputs.append(o)
        return jnp.concatenate(outputs, axis=2), new

    def init_cache(self, B, max_len):
        """Those of the parts."""
        self.check_decoding(max_len)
        return {str(n): part.init_cache(B, max_len) for n, part in enumerate(self.parts)} | {"t": jnp.zeros((), jnp.int32)}

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        outputs, new = [], {"t": cache["t"] + 1}
        for n, (q, k, v) in enumerate(self.divided(q_B1NH, k_B1KH, v_B1KH)):
            o, new[str(n)] = self.parts[n].step(q, k, v, cache[str(n)])
            outputs.append(o)
        return jnp.concatenate(outputs, axis=2), new

    def flops(self, B, T, S):
        return sum(part.flops(B, T, S) for part in self.parts)

    @property
    def specializes(self):
        return any(part.specializes for part in self.parts)

    def specialize(self):
        for part in self.parts:
            part.specialize()

    def backend(self, masked=False):
        return " + ".join(dict.fromkeys(part.backend(masked) for part in self.parts))

    @property
    def gradients_without_key(self):
        return all(part.gradients_without_key for part in self.parts)

    def engines(self, masked=False):
        return " + ".join(dict.fromkeys(name for part in self.parts for name in part.engines(masked).split(" + ")))

    def plan(self, T, S, masked=False):
        return {"backend": self.engines(masked), "parts": [{"part": str(p)} | part.plan(T, S, masked) for p, part in zip(self.options.parts, self.parts)]}


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Those of the parts."""
    from attn_zoo.attention import find

    found = [find(part.spec) for part in options.parts]
    return sum(variant.flops(part_options, B, T, S, n, H, causal) for (variant, part_options), n in zip(found, shares(options, N)))


MIX = Variant(
    name="mix",
    family="mixture",
    options=Options,
    build=Mix,
    paper=Paper(
        "lin2022survey",
        "A Survey of Transformers",
        "Lin, Tianyang and Wang, Yuxin and Liu, Xiangyang and Qiu, Xipeng",
        2022,
        "AI Open 3",
    ),
    complexity="that of its parts",
    flops=flops,
    time_order=2.0,
    memory_order=1.0,
    exact_when=lambda T: {"parts": (Part(Spec("local", (("window", T),))), Part(Spec("full")))},
    decode=True,
)
