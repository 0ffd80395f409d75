"""The kernels of features over their sum: interpreted on the CPU against XLA's, and lowered for NVIDIA GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pallas_linear import assert_close, layer, lowered, results

from attn_zoo.attention.linear import dpfp, elu
from attn_zoo.ops import pallas_kernels
from attn_zoo.ops.pallas_normalized import normalized_features, serves

MAPS = {"elu": (functools.partial(normalized_features, dpfp=False), elu), "dpfp": (functools.partial(normalized_features, dpfp=True), dpfp)}
MAP = pytest.mark.parametrize("name", MAPS)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run on the CPU."""
    monkeypatch.setattr(pallas_kernels, "INTERPRET", True)


def by_xla(phi, x):
    phi = phi(x.astype(jnp.float32))
    total = phi.sum(axis=-1, keepdims=True)
    return phi / jnp.where(total == 0, 1, total)


@MAP
@pytest.mark.parametrize("T, H", [(1, 16), (63, 9), (130, 35), (128, 64)])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-8)], ids=["f32", "bf16"])
def test_equal_the_xla_features(name, T, H, dtype, tolerance, interpreted):
    """Outputs and gradients; in bfloat16 each is rounded once, and so is the gradient that comes in."""
    x = jax.random.normal(jax.random.key(T), (2, T, 3, H)).astype(dtype)
    kernel, phi = MAPS[name]
    actual, expected = results(kernel, (x,)), results(lambda x: by_xla(phi, x).astype(dtype), (x,))
    assert actual[0].dtype == actual[1][0].dtype == dtype
    assert_close(actual, expected, tolerance)


@MAP
def test_a_vector_without_features_gives_zeros(name, interpreted):
    """Of elu + 1 one so negative that no exponential is left, of DPFP zero or a lone channel; the others, and all gradients, are finite."""
    x = jax.random.normal(jax.random.key(0), (1, 20, 1, 16)).at[0, 3].set(-200 if name == "elu" else 0).at[0, 5].set(jnp.where(jnp.arange(16) == 2, 1.0, -300 if name == "elu" else 0))
    phi, (dx,) = results(MAPS[name][0], (x,))
    assert not phi[0, 3].any() and phi[0, 4].any() and np.isfinite(phi).all() and np.isfinite(dx).all()
    assert_close((phi, (dx,)), results(functools.partial(by_xla, MAPS[name][1]), (x,)), 2e-6)


def test_under_vmap_they_are_the_same(interpreted):
    x = jax.random.normal(jax.random.key(0), (2, 20, 3, 9))
    for kernel, _ in MAPS.values():
        assert_close(jax.jit(jax.vmap(kernel))(x[:, None])[:, 0], kernel(x), 1e-6)


@pytest.mark.parametrize(
    "spec, dtype, H, taken",
    [
        ("delta", jnp.bfloat16, 64, True),
        ("delta", jnp.float32, 64, False),
        ("delta(nu=2)", jnp.bfloat16, 64, False),
        ("delta(feature_map='elu')", jnp.float32, 128, True),
        ("delta(feature_map='elu')", jnp.bfloat16, 160, False),
    ],
)
def test_layers_take_them_where_they_serve(spec, dtype, H, taken, interpreted):
    shapes = [jax.ShapeDtypeStruct((2, 64, heads, H), dtype) for heads in (4, 2, 2)]
    program = str(jax.make_jaxpr(layer(spec, H=H, dtype=dtype))(*shapes))
    assert ("features_kernel" in program) == taken and "states_kernel" in program
    assert serves(dtype, H, "elu" not in spec) == taken or "nu" in spec


@MAP
@pytest.mark.parametrize("H", [40, 64, 128])
def test_lowers_for_cuda(name, H):
    loss = lambda x: MAPS[name][0](x).astype(jnp.float32).sum()
    text = lowered(jax.value_and_grad(loss), jax.ShapeDtypeStruct((2, 333, 4, H), jnp.bfloat16))
    assert [text.count(f'name = "{kernel}"') for kernel in ("features_kernel", "features_gradient_kernel")] == [1, 1]
