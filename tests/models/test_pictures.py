"""Convolutional networks with attention in them, against loops over pixels and the papers' formulas."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo.attention.base import Statistic
from attn_zoo.models.pictures import Convolution, ConvolutionEncoder, ConvolutionNet, GroupNorm, SelfAttention2D
from attn_zoo.spec import UserError

SHAPE = (8, 6, 3)


@pytest.fixture
def pictures():
    return lambda B=2, shape=SHAPE, seed=0: jax.random.uniform(jax.random.key(seed), (B, *shape))


def convolve(x_hwc, kernel, stride):
    """'SAME' by loops: as much zero padding on both sides as the last window needs, the odd one behind."""
    size = kernel.shape[0]
    outs = [-(-n // stride) for n in x_hwc.shape[:2]]
    pads = [max((out - 1) * stride + size - n, 0) for out, n in zip(outs, x_hwc.shape[:2])]
    padded = np.pad(x_hwc, [(p // 2, p - p // 2) for p in pads] + [(0, 0)])
    y = np.zeros((*outs, kernel.shape[3]))
    for i, j in itertools.product(*map(range, outs)):
        y[i, j] = np.einsum("hwc,hwcd->d", padded[i * stride : i * stride + size, j * stride : j * stride + size], kernel)
    return y


@pytest.mark.parametrize("size, stride, h, w", [(3, 1, 5, 4), (3, 2, 8, 6), (3, 2, 7, 5), (1, 1, 3, 3)])
def test_convolution_is_a_loop_over_windows(pictures, size, stride, h, w):
    layer = Convolution(3, 4, size, stride, rngs=nnx.Rngs(0))
    x_Bhwc = pictures(shape=(h, w, 3))
    expected = [convolve(np.asarray(x, np.float64), np.asarray(layer.kernel[...]), stride) for x in x_Bhwc]
    np.testing.assert_allclose(layer(x_Bhwc), expected, atol=1e-5)


@pytest.mark.parametrize("channels, groups", [(16, 8), (12, 4), (5, 1)])
def test_group_norm_makes_each_group_of_a_picture_standard(channels, groups):
    norm = GroupNorm(channels)
    norm.scale[...], norm.bias[...] = jnp.linspace(0.5, 2, channels), jnp.linspace(-1, 1, channels)
    x_Bhwc = np.random.RandomState(0).normal(3, 2, size=(2, 3, 4, channels))
    expected = np.empty_like(x_Bhwc)
    for b, group in itertools.product(range(2), np.split(np.arange(channels), groups)):
        part = x_Bhwc[b][..., group]
        expected[b][..., group] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    expected = expected * np.linspace(0.5, 2, channels) + np.linspace(-1, 1, channels)
    np.testing.assert_allclose(norm(jnp.asarray(x_Bhwc, jnp.float32)), expected, atol=1e-5)


def test_self_attention_starts_as_the_identity_and_its_gate_learns():
    layer = SelfAttention2D(8, (4, 3), N=2, rngs=nnx.Rngs(0))
    x_Bhwc = jax.random.normal(jax.random.key(0), (2, 4, 3, 8))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params):
        y_Bhwc = nnx.merge(graph, params, rest)(x_Bhwc)
        return jnp.square(y_Bhwc).sum(), y_Bhwc

    grads, y_Bhwc = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal(y_Bhwc, x_Bhwc)
    assert nnx.to_pure_dict(grads)["gate"] != 0


@pytest.mark.parametrize("N, H", [(1, None), (2, None), (2, 5)])
def test_self_attention_is_that_of_sagan_over_all_pairs_of_cells(N, H):
    """Eq. 1-3 by loops, with 1 x 1 convolutions for all four maps."""
    layer = SelfAttention2D(8, (3, 4), N=N, H=H, rngs=nnx.Rngs(0))
    layer.gate[...] = 0.7
    x_hwc = np.random.RandomState(0).normal(size=(3, 4, 8))
    kernels = {name: np.asarray(getattr(layer.mixer, name)[...], np.float64) for name in ("query", "key", "value", "out")}
    head_dim = kernels["query"].shape[2]
    assert head_dim == (H or 8 // (2 * N))
    o_hwc = np.zeros((3, 4, 8))
    for n in range(N):
        q, k, v = (convolve(x_hwc, kernels[name][None, None, :, n], 1) for name in ("query", "key", "value"))
        cells = list(itertools.product(range(3), range(4)))
        for j in cells:
            beta = np.exp([q[j] @ k[i] / np.sqrt(head_dim) for i in cells])
            mean = sum(b * v[i] for b, i in zip(beta / beta.sum(), cells))
            o_hwc[j] += mean @ kernels["out"][n]
    np.testing.assert_allclose(layer(jnp.asarray(x_hwc[None], jnp.float32))[0], x_hwc + 0.7 * o_hwc, atol=1e-5)


def test_axial_attention_sees_row_and_column_of_the_grid():
    layer = SelfAttention2D(4, (5, 3), variant="axial(width=3)", rngs=nnx.Rngs(0))
    layer.gate[...] = 1.0
    grad = jax.jit(jax.grad(lambda x_hwc: layer(x_hwc[None])[0, 1, 2].sum()))(jax.random.normal(jax.random.key(0), (5, 3, 4)))
    seen = np.asarray(jnp.abs(grad).max(axis=2) > 0)
    expected = np.zeros((5, 3), bool)
    expected[1, :] = expected[:, 2] = True
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("variant", ["linear", "lsh"])
def test_any_variant_serves(pictures, variant):
    """Finite outputs, and gradients in every projection of the attention and in its gate."""
    net = ConvolutionNet(SHAPE, channels=(4, 8), attention=variant, N=2, rngs=nnx.Rngs(0))
    net.attention.gate[...] = 1.0
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def loss(params):
        y_Bhwc = nnx.merge(graph, params, rest)(pictures(), key=jax.random.key(1))
        return jnp.square(y_Bhwc).sum(), y_Bhwc

    grads, y_Bhwc = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert y_Bhwc.shape == (2, 4, 3, 8) and jnp.isfinite(y_Bhwc).all()
    attention = nnx.to_pure_dict(grads)["attention"]
    for name, grad in {"gate": attention["gate"], **attention["mixer"]}.items():
        if not isinstance(grad, dict):  # what the variant holds itself
            assert jnp.isfinite(grad).all() and (grad != 0).any(), name


def test_the_gate_is_left_to_be_recorded():
    net = ConvolutionNet(SHAPE, channels=(4, 8), attention="full", rngs=nnx.Rngs(0))
    net.attention.gate[...] = -0.3
    graph, state = nnx.split(net)

    @jax.jit
    def call(state, picture_Bhwc):
        net = nnx.merge(graph, state)
        net(picture_Bhwc)
        return nnx.state(net, Statistic)

    (left,) = jax.tree.leaves(call(state, jnp.zeros((1, *SHAPE))))
    assert float(left) == pytest.approx(-0.3)


def test_the_attention_layer_stands_where_it_is_told_to():
    for after, cells in ((0, 8 * 6), (1, 4 * 3), (-1, 2 * 2)):
        net = ConvolutionNet(SHAPE, channels=(4, 4, 8), attention="full", attention_after=after, rngs=nnx.Rngs(0))
        assert net.attention.mixer.attention.dims.max_len == cells
    assert ConvolutionNet(SHAPE, channels=(4, 4, 8), rngs=nnx.Rngs(0)).attention is None


@pytest.mark.parametrize("channels, grid", [((4,), (8, 6)), ((4, 8), (4, 3)), ((4, 8, 8), (2, 2))])
def test_encoder_gives_one_feature_for_each_cell(pictures, channels, grid):
    encoder = ConvolutionEncoder(SHAPE, 10, channels=channels, rngs=nnx.Rngs(0))
    assert encoder.net.grid == grid
    assert jax.eval_shape(encoder, pictures()).shape == (2, encoder.source_len, 10) == (2, grid[0] * grid[1], 10)


def test_encoder_tells_rows_from_columns_row_by_row(pictures):
    """What a cell's feature has beyond its picture is its row's and its column's part."""
    encoder = ConvolutionEncoder(SHAPE, 10, channels=(4, 8), rngs=nnx.Rngs(0))
    with_places = encoder(pictures())
    rows, columns = (np.sqrt(10) * np.asarray(table[...]) for table in (encoder.rows, encoder.columns))
    encoder.rows[...], encoder.columns[...] = jnp.zeros((4, 10)), jnp.zeros((3, 10))
    places_SD = np.asarray(with_places - encoder(pictures()))[0]
    expected = [rows[i] + columns[j] for i, j in itertools.product(range(4), range(3))]
    np.testing.assert_allclose(places_SD, expected, atol=1e-5)


def test_a_dot_moves_the_feature_of_its_cell_and_of_near_ones_alone():
    encoder = ConvolutionEncoder((16, 16, 3), 8, channels=(4, 4), rngs=nnx.Rngs(0))
    first, second = (stage.into for stage in encoder.net.stages)
    seen = jax.grad(lambda x_hwc: second(first(x_hwc[None]))[0, 2, 3].sum())(jnp.zeros((16, 16, 3)))
    rows, columns = np.nonzero(np.abs(seen).max(axis=-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 7, 5, 9)  # 2 * 2 and 2 * 3, and the windows of two convolutions around


def test_parameters_are_float32_and_bfloat16_is_computed_where_asked(pictures):
    features = []
    for dtype in (jnp.float32, jnp.bfloat16):
        encoder = ConvolutionEncoder(SHAPE, 10, channels=(4, 8), dtype=dtype, rngs=nnx.Rngs(0))
        assert {p.dtype for p in jax.tree.leaves(nnx.state(encoder, nnx.Param))} == {jnp.dtype(jnp.float32)}
        features.append(jax.jit(encoder)(pictures()))
        assert features[-1].dtype == dtype
    f32, bf16 = (np.asarray(x, np.float32) for x in features)
    assert 0 < np.abs(f32 - bf16).max() < 0.1 * np.abs(f32).max()


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda rngs: ConvolutionNet(SHAPE, channels=(), rngs=rngs), r"channels=\(\): must list at least one stage"),
        (lambda rngs: ConvolutionNet(SHAPE, channels=(4, 0), rngs=rngs), "channels=0: must be a whole number of at least 1"),
        (lambda rngs: ConvolutionNet(SHAPE, attention="full", attention_after=3, rngs=rngs), "attention_after=3: must be a stage, 0 to 2"),
        (lambda rngs: SelfAttention2D(6, (4, 4), N=2, rngs=rngs), "channels=6: must be a multiple of 2 N = 4, unless H is given"),
        (lambda rngs: SelfAttention2D(8, (4, 4), variant="ful", rngs=rngs), "there is no attention variant 'ful'; did you mean 'full'?"),
        (lambda rngs: ConvolutionNet(SHAPE, channels=(4,), rngs=rngs)(jnp.zeros((1, 6, 8, 3))), r"picture=\(6, 8, 3\): must have the shape \(8, 6, 3\)"),
    ],
)
def test_mistakes_are_named(build, words):
    with pytest.raises(UserError, match=words):
        build(nnx.Rngs(0))
