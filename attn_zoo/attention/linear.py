"""Linearized attention: exp(q'k) replaced by phi(q)'phi(k), so that keys and values are summed once for all queries.

Katharopoulos et al. 2020, eq. 5 (bidirectional) and 9 (causal, here as a chunked scan instead of one position at a time). No 1/sqrt(H).

Feature maps phi besides theirs: 'relu' (Choromanski et al. 2021, sec. 4.2); 'dpfp', deterministic and parameter-free (Schlag et al. 2021,
sec. 5.3); and 'cosformer' (Qin et al. 2022, sec. 3.3): relu, with pairs weighted by cos(pi / 2 (i - j) / M). M is max_len, so that neither
the length of a sequence nor its future moves the weights; the authors' code takes the longest length of each call.
A query that has weight for no key it sees gives zeros.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from attn_zoo.attention.base import Attention, Bound, Paper, Variant, repeat_kv
from attn_zoo.ops import backends
from attn_zoo.ops.angles import sines_and_cosines
from attn_zoo.ops.linear import divided, init_state, linear_attention, read_state, state_step, with_ones
from attn_zoo.spec import check, check_choice, check_int


def elu(x):
    """elu(x) + 1, without cancellation. Katharopoulos et al. 2020, eq. 7."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def dpfp(x, nu: int = 1):
    """[..., H] -> [..., 2 H nu], float32: with r = relu([x, -x]), the products r_i r_{i - s} for s = 1 to nu, i cyclic. Schlag et al. 2021, sec. 5.3."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    r = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    return jnp.concatenate([r * jnp.roll(r, shift, axis=-1) for shift in range(1, nu + 1)], axis=-1)


def cosformer(x_BTNH, M: int, start=0):
    """[B, T, N, 2 H], float32, of positions from `start` on: relu(x) times the cosine and times the sine of pi / 2 t / M. cos(a - b) = cos a cos b + sin a sin b makes the rest."""
    sin_T11, cos_T11 = (x_T1[:, None] for x_T1 in sines_and_cosines(x_BTNH.shape[1], np.array([np.pi / 2 / M]), start))
    x = jax.nn.relu(x_BTNH)
    return jnp.concatenate([x * cos_T11, x * sin_T11], axis=-1)


FEATURE_MAPS = {"elu": elu, "relu": jax.nn.relu, "dpfp": dpfp, "cosformer": cosformer}
OF_NUMBERS = ("elu", "relu")  # those that make a feature of each number


@dataclasses.dataclass(frozen=True)
class Options:
    """feature_map: phi; nu: how many shifts 'dpfp' multiplies, for R = 2 H nu features."""

    feature_map: str = "elu"
    nu: int = 1

    def __post_init__(self):
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        check_int("nu", self.nu, 1)
        check(self.nu == 1 or self.feature_map == "dpfp", "nu", self.nu, f"belongs to feature_map='dpfp', not to {self.feature_map!r}")


class KernelDecoding(Attention):
    """The backend of kernel attention, and generation: the state is sum_j phi(k_j) [v_j, 1]', of one size at any length. Katharopoulos et al. 2020, sec. 3.4."""

    def features_at(self, q_B1NH, k_B1KH, t):
        """(phi(q), phi(k)) of position t."""
        raise NotImplementedError

    def backend(self, masked=False):
        return backends.choose_scan(self.dims.backend, self.dims.dtype)

    def init_cache(self, B, max_len):
        self.check_decoding(max_len)
        d = self.dims
        features = jax.eval_shape(lambda: self.features_at(jnp.zeros((B, 1, d.num_heads, d.head_dim)), jnp.zeros((B, 1, d.num_kv_heads, d.head_dim)), 0))
        return init_state(B, d.num_kv_heads, features[1].shape[-1], d.head_dim + 1)

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        phi_q, phi_k = self.features_at(q_B1NH, k_B1KH, cache["t"])
        sums_B1NR, state = state_step(phi_q, phi_k, with_ones(v_B1KH), cache["state"])
        return divided(sums_B1NR[..., :-1], sums_B1NR[..., -1]).astype(q_B1NH.dtype), {"state": state, "t": cache["t"] + 1}

    def cross_state(self, k_BSKH, v_BSKH, valid_BS, max_len):
        """The sums over all keys, which every query reads alike."""
        d = self.dims
        phi_k = self.features_at(jnp.zeros((len(k_BSKH), 1, d.num_heads, d.head_dim), d.dtype), k_BSKH, 0)[1]
        phi_k = jnp.where(valid_BS[:, :, None, None], phi_k, 0)
        return {"state": jnp.einsum("BSKR,BSKH->BKRH", phi_k, with_ones(v_BSKH), preferred_element_type=jnp.float32)}

    def cross_step(self, q_B1NH, cache):
        d = self.dims
        phi_q, _ = self.features_at(q_B1NH, jnp.zeros((len(q_B1NH), 1, d.num_kv_heads, d.head_dim), d.dtype), cache["t"])
        sums_B1NR = read_state(phi_q, cache["state"])
        return divided(sums_B1NR[..., :-1], sums_B1NR[..., -1]).astype(q_B1NH.dtype), cache | {"t": cache["t"] + 1}


class Linear(KernelDecoding):
    """Kernel attention with a fixed feature map."""

    @property
    def anywhere(self):
        return self.options.feature_map != "cosformer"

    def features_at(self, q_B1NH, k_B1KH, t):
        return self.features(q_B1NH, k_B1KH, None, t)

    def features(self, q_BTNH, k_BSKH, valid_BS, start=0):
        """(phi(q), phi(k)) of positions from `start` on, with zeros for invalid keys."""
        name = self.options.feature_map
        arguments = {"dpfp": {"nu": self.options.nu}, "cosformer": {"M": self.dims.max_len, "start": start}}.get(name, {})
        phi = functools.partial(FEATURE_MAPS[name], **arguments)
        phi_k = phi(k_BSKH)
        return phi(q_BTNH), phi_k if valid_BS is None else jnp.where(valid_BS[:, :, None, None], phi_k, 0)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        attend = functools.partial(linear_attention, causal=self.dims.causal, backend=self.backend(valid_BS is not None))
        if valid_BS is None and self.options.feature_map in OF_NUMBERS:
            return attend(q_BTNH, k_BSKH, v_BSKH, phi=FEATURE_MAPS[self.options.feature_map])
        return attend(*self.features(q_BTNH, k_BSKH, valid_BS), v_BSKH)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        return kernel_reference(*self.features(q_BTNH, k_BSKH, valid_BS), v_BSKH, causal=self.dims.causal)

    def flops(self, B, T, S):
        d = self.dims
        return flops(self.options, B, T, S, d.num_heads, d.head_dim, d.causal, K=d.num_kv_heads)


def kernel_reference(phi_q_BTNR, phi_k_BSKR, v_BSKH, *, causal: bool):
    """Dense kernel attention: weights phi(q_i)'phi(k_j) over their sum, all pairs written out."""
    N = phi_q_BTNR.shape[2]
    weights_BNTS = jnp.einsum("BTNR,BSNR->BNTS", phi_q_BTNR, repeat_kv(phi_k_BSKR, N), precision="highest")
    if causal:
        weights_BNTS = jnp.tril(weights_BNTS)
    total = weights_BNTS.sum(axis=-1, keepdims=True)
    weights_BNTS = weights_BNTS / jnp.where(total == 0, 1, total)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, repeat_kv(v_BSKH, N), precision="highest")


def state_flops(B: int, T: int, S: int, N: int, K: int, R: int, H: int) -> float:
    """R H multiply-adds for the state and R for the denominator: updated by every key of each key/value head, read by every query of each head."""
    return 2.0 * B * (T * N + S * K) * (R * H + R)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool, K: int | None = None) -> float:
    """State update and read-out over R features; K key/value heads (N by default)."""
    R = {"dpfp": 2 * options.nu * H, "cosformer": 2 * H}.get(options.feature_map, H)
    return state_flops(B, T, S, N, K or N, R, H)


LINEAR = Variant(
    name="linear",
    family="linearized",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Linear(options, dims),
    paper=Paper(
        "katharopoulos2020transformers",
        "Transformers are {RNNs}: Fast Autoregressive Transformers with Linear Attention",
        "Katharopoulos, Angelos and Vyas, Apoorv and Pappas, Nikolaos and Fleuret, Fran{\\c{c}}ois",
        2020,
        "Proceedings of the 37th International Conference on Machine Learning",
    ),
    complexity="T H",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: None,
    decode=True,
    state_order=0.0,
    bound=Bound("both tend to the mean of the visible values as keys tend to 0", scale=0.01, error=0.05),
)
