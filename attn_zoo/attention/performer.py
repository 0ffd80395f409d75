"""Performer: softmax attention estimated without bias by positive orthogonal random features (FAVOR+).

exp(q'k / sqrt(H)) = E_w [phi_w(q) phi_w(k)] with phi_w(x) = exp(w'x - |x|^2 / 2), x scaled by H^-1/4, w ~ N(0, I) (Choromanski et al. 2021, lemma 1
and sec. 2.4); the w are orthogonal in blocks of H, as long as Gaussian vectors are.

Every query's features are divided by their largest, which cancels in the ratio. The authors' code divides those of the keys by their largest over
all positions, the future too, and adds 1e-4 to every feature. Here neither: outputs stay strictly causal and the kernel unbiased, and keys so
long that all their features vanish in float32 have no weight (a row that sees only such keys is zero).
With `redraw`, every call that has a random key draws new features and leaves them in the layer, where evaluation finds them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.base import Bound, Drawn, Paper, Variant
from attn_zoo.attention.linear import KernelDecoding, kernel_reference, state_flops
from attn_zoo.ops.linear import divided, linear_attention, linear_attention_by_chunks
from attn_zoo.ops.native_linear import native_random_feature_sums
from attn_zoo.ops.pallas_features import positive_features, serves
from attn_zoo.ops.rows import dot_rows
from attn_zoo.spec import check, check_int

LARGEST = 60.0  # exponent of a key's feature; w'k - |k|^2 / 2 <= |w|^2 / 2 passes it only for H > 64 and a key close to w itself


@dataclasses.dataclass(frozen=True)
class Options:
    """features: random features, shared by all heads (the error falls as 1 / sqrt(features)); redraw: new ones at every training step."""

    features: int = 128
    redraw: bool = False

    def __post_init__(self):
        check_int("features", self.features, 1)
        check(isinstance(self.redraw, bool), "redraw", self.redraw, "must be True or False")


class Features(Drawn):
    """Random directions: saved with the model, never trained."""


def draw(key, features: int, H: int):
    """[features, H] directions, orthogonal in blocks of H rows, each distributed as a Gaussian vector. Choromanski et al. 2021, sec. 2.4."""
    blocks = -(-features // H)
    block_key, norm_key = jax.random.split(key)
    # QR leaves the signs of Q to the algorithm (LAPACK turns Q[0, 0] negative); with the diagonal of R made positive, Q is uniform.
    q_CHH, r_CHH = jnp.linalg.qr(jax.random.normal(block_key, (blocks, H, H)))
    q_CHH = q_CHH * jnp.sign(jnp.diagonal(r_CHH, axis1=1, axis2=2))[:, None, :]
    directions = q_CHH.swapaxes(1, 2).reshape(blocks * H, H)[:features]
    return directions * jnp.linalg.norm(jax.random.normal(norm_key, (features, H)), axis=1, keepdims=True)


class Performer(KernelDecoding):
    """FAVOR+."""

    anywhere = True

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        self.directions = Features(draw(rngs.params(), options.features, dims.head_dim))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        backend, w_RH = self.backend(valid_BS is not None), self.directions_for(key)
        if backend == "native":
            return divided(*native_random_feature_sums(q_BTNH, k_BSKH, v_BSKH, w_RH, valid_BS, causal=self.dims.causal, largest=LARGEST))
        if backend == "xla" and not self.dims.causal:
            return linear_attention_by_chunks(lambda q: query_features(q, w_RH), lambda k: key_features(k, w_RH), q_BTNH, k_BSKH, v_BSKH, valid_BS)
        return linear_attention(*self.features(q_BTNH, k_BSKH, valid_BS, w_RH, backend), v_BSKH, causal=self.dims.causal, backend=backend)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        return kernel_reference(*self.features(q_BTNH, k_BSKH, valid_BS, self.directions_for(key)), v_BSKH, causal=self.dims.causal)

    def features_at(self, q_B1NH, k_B1KH, t):
        return self.features(q_B1NH, k_B1KH, None, self.directions_for(None))

    def features(self, q_BTNH, k_BSKH, valid_BS, w_RH, backend="xla"):
        """(phi(q), phi(k)), float32, zeros for invalid keys. On backend "pallas" bfloat16 of bfloat16, as its products want them."""
        if self.beside(backend) == "pallas":
            return positive_features(q_BTNH, w_RH), positive_features(k_BSKH, w_RH, valid_BS, largest=LARGEST)
        phi_q, phi_k = query_features(q_BTNH, w_RH), key_features(k_BSKH, w_RH)
        return phi_q, phi_k if valid_BS is None else jnp.where(valid_BS[:, :, None, None], phi_k, 0)

    def beside(self, backend):
        """Of the features."""
        return "xla" if backend == "pallas" and not serves(self.dims.head_dim) else backend

    def directions_for(self, key):
        """Those of this call, [R, H]."""
        if self.options.redraw and key is not None:
            w_RH = draw(key, self.options.features, self.dims.head_dim)
            self.leave("directions", w_RH)
            return w_RH
        return self.directions[...]

    def flops(self, B, T, S):
        d = self.dims
        return flops(self.options, B, T, S, d.num_heads, d.head_dim, d.causal, K=d.num_kv_heads)


def query_features(q_BTNH, w_RH):
    """phi of queries, over their largest."""
    q = exponents(q_BTNH, w_RH)
    return jnp.exp(q - jax.lax.stop_gradient(q.max(axis=-1, keepdims=True)))


def key_features(k_BSKH, w_RH):
    """phi of keys."""
    return jnp.exp(jnp.minimum(exponents(k_BSKH, w_RH), LARGEST))


def exponents(x_BTNH, w_RH):
    """w'x - |x|^2 / 2 of x scaled by H^-1/4, float32 at least. Choromanski et al. 2021, lemma 1."""
    x = x_BTNH.astype(jnp.promote_types(x_BTNH.dtype, jnp.float32)) * x_BTNH.shape[-1] ** -0.25
    return jnp.einsum("BTNH,RH->BTNR", x, w_RH, precision="highest") - 0.5 * dot_rows(x, x)[..., None]


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool, K: int | None = None) -> float:
    """Features of queries and keys, state update and read-out; K key/value heads (N by default)."""
    K = K or N
    return 2.0 * B * (T * N + S * K) * H * options.features + state_flops(B, T, S, N, K, options.features, H)


PERFORMER = Variant(
    name="performer",
    family="linearized",
    options=Options,
    build=Performer,
    paper=Paper(
        "choromanski2021rethinking",
        "Rethinking Attention with Performers",
        "Choromanski, Krzysztof and Likhosherstov, Valerii and Dohan, David and Song, Xingyou and Gane, Andreea and Sarlos, Tamas and Hawkins, Peter and "
        "Davis, Jared and Mohiuddin, Afroz and Kaiser, {\\L}ukasz and Belanger, David and Colwell, Lucy and Weller, Adrian",
        2021,
        "International Conference on Learning Representations",
    ),
    complexity="T R",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: None,
    decode=True,
    state_order=0.0,
    # Measured 0.34, of long queries whose estimates have heavy tails. Causal, the mean of the values is 0.78 away; bidirectionally zeros are 0.43.
    bound=Bound("an unbiased estimate of the softmax kernel", scale=0.3, error=0.4, options=(("features", 16384),)),
)
