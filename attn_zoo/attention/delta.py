"""Fast weight programmer with the delta rule: a key overwrites what its like has written, instead of adding to it.

S_t = S_{t-1} + beta_t (v_t - S_{t-1} phi(k_t)) phi(k_t)',  o_t = S_t phi(q_t) (Schlag et al. 2021, sec. 4.2), with phi the DPFP of their sec. 5.3 or
elu + 1, divided by the sum of its features; in chunks, after Yang et al. 2024. beta_t = sigmoid(w' k_t + b), a learned rate of writing.

Beyond the paper: beta reads the head's key instead of the layer's input; and bidirectionally the outputs of two memories are added, one written
from the start on and one from the end. The output scale 1 / sqrt(H) of the authors' code is left to the projection that follows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.base import Attention, Bound, Paper, Variant, repeat_kv
from attn_zoo.attention.linear import dpfp, elu
from attn_zoo.ops import backends
from attn_zoo.ops.delta import delta_rule
from attn_zoo.ops.linear import init_state, state_step
from attn_zoo.ops.pallas_normalized import normalized_features, serves
from attn_zoo.spec import check, check_choice, check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """feature_map: phi; nu: how many shifts 'dpfp' multiplies, for R = 2 H nu features ('elu' has H)."""

    feature_map: str = "dpfp"
    nu: int = 1

    def __post_init__(self):
        check_choice("feature_map", self.feature_map, ("dpfp", "elu"))
        check_int("nu", self.nu, 1)
        check(self.nu == 1 or self.feature_map == "dpfp", "nu", self.nu, f"belongs to feature_map='dpfp', not to {self.feature_map!r}")


class Delta(Attention):
    """DeltaNet: one memory per key/value head."""

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        K, H = dims.num_kv_heads, dims.head_dim
        self.rate_kernel = nnx.Param(jax.random.normal(rngs.params(), (K, H)) * H**-0.5)
        self.rate_bias = nnx.Param(jnp.zeros((K,)))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        backend = self.backend(valid_BS is not None)
        return self.directions(functools.partial(delta_rule, backend=backend), *self.inputs(q_BTNH, k_BSKH, v_BSKH, valid_BS, backend))

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        q, k, v, beta = self.inputs(q_BTNH, k_BSKH, v_BSKH, valid_BS)
        return self.directions(delta_rule_reference, q, *(repeat_kv(x, self.dims.num_heads) for x in (k, v, beta)))

    def init_cache(self, B, max_len):
        self.check_decoding(max_len)
        d = self.dims
        return init_state(B, d.num_kv_heads, feature_count(self.options, d.head_dim), d.head_dim)

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        phi_q, phi_k, v_B1KH, beta_B1K = self.inputs(q_B1NH, k_B1KH, v_B1KH, None)
        read_B1KH = jnp.einsum("BTKR,BKRH->BTKH", phi_k, cache["state"])
        o_B1NH, state = state_step(phi_q, phi_k, beta_B1K[..., None] * (v_B1KH - read_B1KH), cache["state"])
        return o_B1NH.astype(q_B1NH.dtype), {"state": state, "t": cache["t"] + 1}

    def directions(self, rule, *inputs):
        """Read forwards, and backwards too if not causal."""
        o_BTNH = rule(*inputs)
        return o_BTNH if self.dims.causal else o_BTNH + rule(*(x[:, ::-1] for x in inputs))[:, ::-1]

    def inputs(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, backend="xla"):
        """(phi(q), phi(k), v, beta); beta is 0 at invalid keys, which write nothing."""
        phi_q, phi_k = (self.features(x, backend) for x in (q_BTNH, k_BSKH))
        beta_BSK = jax.nn.sigmoid(jnp.einsum("BSKH,KH->BSK", k_BSKH.astype(jnp.float32), self.rate_kernel[...]) + self.rate_bias[...])
        return phi_q, phi_k, v_BSKH, beta_BSK if valid_BS is None else jnp.where(valid_BS[:, :, None], beta_BSK, 0)

    def features(self, x, backend="xla"):
        """phi(x) over the sum of its features, so that a memory read with the features it was written with stays within its values.

        float32; on backend "pallas", where a kernel makes them, bfloat16 of bfloat16, as its products want them.
        """
        is_dpfp, nu = self.options.feature_map == "dpfp", self.options.nu
        if self.beside(backend) == "pallas" and serves(x.dtype, x.shape[-1], is_dpfp):  # arrays may be of another dtype than the layer is built for
            return normalized_features(x, dpfp=is_dpfp)
        return normalized(dpfp(x, nu) if is_dpfp else elu(x.astype(jnp.float32)))

    def beside(self, backend):
        """Of the features."""
        served = self.options.nu == 1 and serves(self.dims.dtype, self.dims.head_dim, self.options.feature_map == "dpfp")
        return "xla" if backend == "pallas" and not served else backend

    def backend(self, masked=False):
        return backends.choose_scan(self.dims.backend, self.dims.dtype, corrected=feature_count(self.options, self.dims.head_dim))

    def flops(self, B, T, S):
        d = self.dims
        return flops(self.options, B, T, S, d.num_heads, d.head_dim, d.causal, K=d.num_kv_heads)


def normalized(phi):
    """Features over their sum, zeros where that is zero."""
    total = phi.sum(axis=-1, keepdims=True)
    return phi / jnp.where(total == 0, 1, total)


def feature_count(options: Options, H: int) -> int:
    """R of phi for a head of H."""
    return 2 * options.nu * H if options.feature_map == "dpfp" else H


def delta_rule_reference(q_BTNR, k_BTNR, v_BTNH, beta_BTN):
    """The rule, position by position."""

    def step(S_BNHR, inputs):
        q, k, v, beta = inputs
        read = jnp.einsum("BNHR,BNR->BNH", S_BNHR, k, precision="highest")
        S_BNHR = S_BNHR + (beta[..., None] * (v - read))[..., None] * k[..., None, :]
        return S_BNHR, jnp.einsum("BNHR,BNR->BNH", S_BNHR, q, precision="highest")

    B, _, N, H = v_BTNH.shape
    start = jnp.zeros((B, N, H, k_BTNR.shape[-1]))
    return jax.lax.scan(step, start, tuple(jnp.moveaxis(x, 1, 0) for x in (q_BTNR, k_BTNR, v_BTNH, beta_BTN)))[1].swapaxes(0, 1)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool, K: int | None = None) -> float:
    """R H multiply-adds to read the memory and R H to write it for every key of K key/value heads (N by default), and R H to read it for every query."""
    R = feature_count(options, H)
    return 2.0 * B * (T * N + 2 * S * (K or N)) * R * H * (1 if causal else 2)


DELTA = Variant(
    name="delta",
    family="linearized",
    options=Options,
    build=Delta,
    paper=Paper(
        "schlag2021linear",
        "Linear Transformers Are Secretly Fast Weight Programmers",
        "Schlag, Imanol and Irie, Kazuki and Schmidhuber, J{\\\"u}rgen",
        2021,
        "Proceedings of the 38th International Conference on Machine Learning",
    ),
    complexity="T R",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: None,
    decode=True,
    state_order=0.0,
    bound=Bound(
        # Measured 2.24 and 0.68, causal, the error at a first position, where full attention gives one value and the memory is almost empty; outputs of zero,
        # with their sign turned, moved by one position or swapped between the two heads are at 2.32 or more. Where nothing is causal, 0.26 and 0.90.
        "no limit of it is a softmax; as keys tend to 0 its memory is a running average of the values, at the rate beta / R",
        scale=0.01,
        error=2.28,
        cosine=0.65,
        options=(("feature_map", "elu"),),
    ),
    cross="its memory is written and read in the order of one sequence",
)
