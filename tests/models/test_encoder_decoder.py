"""Encoder and decoder: one model with three settings, in which every variant may stand in three places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import VARIANTS, config
from attn_zoo.attention import ScoreFunction, parse_variant
from attn_zoo.models import Transformer, param_counts
from attn_zoo.spec import Unsupported, UserError
from attn_zoo.train import make_optimizer

T, S, V, U = 10, 13, 11, 9
POOLING = {"attention_over_attention", "clustered", "informer", "nystrom"}  # queries together: later targets would reach earlier ones


def make(variant="full", *, source_vocab=U, source_len=S, seed=0, **fields):
    model = config.Model(**({"D": 16, "layers": 2, "N": 2, "positions": "sinusoidal"} | fields))
    sizes = dict(inputs_vocab=V, num_outputs=V, max_len=T, source_vocab=source_vocab, source_len=source_len)
    return Transformer(model, variant=parse_variant(variant), causal=True, per_token=True, rngs=nnx.Rngs(seed), **sizes)


def batch(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    tokens, source = jax.random.randint(keys[0], (3, T), 0, V), jax.random.randint(keys[1], (3, S), 0, U)
    return tokens, source, jnp.arange(S) < jnp.array([[S], [4], [8]])


def names(model):
    found = {"self": [b.mixer.attention for b in model.blocks], "cross": [b.cross.attention for b in model.blocks], "encoder": [b.mixer.attention for b in model.encoder.blocks]}
    return {place: [a.variant.name for a in attentions] for place, attentions in found.items()}


def test_the_swept_variant_stands_where_it_is_told():
    assert names(make("local(window=3)")) == {"self": ["local"] * 2, "cross": ["full"] * 2, "encoder": ["local"] * 2}
    assert names(make("linear", where=("cross",))) == {"self": ["full"] * 2, "cross": ["linear"] * 2, "encoder": ["full"] * 2}
    assert names(make("[full, linear]", where=("decoder",), cross="topk(k=3)", encoder_layers=1)) == {"self": ["full", "linear"], "cross": ["topk"] * 2, "encoder": ["full"]}


def test_a_place_that_the_model_has_not_is_refused():
    with pytest.raises(UserError, match="where=cross: this model has no such place for the variant; it has encoder and decoder"):
        Transformer(config.Model(where=("cross",)), variant=parse_variant("full"), inputs_vocab=V, num_outputs=V, max_len=T, causal=True, per_token=True, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="where=.*must name a place"):
        config.Model(where=())


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.cross is True])
def test_every_variant_that_claims_cross_reads_an_encoder_or_says_why_not(name):
    build = lambda: make(name, where=("cross",), layers=1)
    tokens, source, valid = batch()
    try:
        model = build()
    except Unsupported as e:
        assert name in POOLING and "depends on the other queries" in str(e)
        return
    assert name not in POOLING
    run = jax.jit(lambda source: model(tokens, source=source, source_valid=valid))
    logits = run(source)
    assert logits.shape == (3, T, V) and np.isfinite(logits).all()
    moved = run(source.at[0, 2].add(1) % U)
    assert (np.asarray(moved[0]) != np.asarray(logits[0])).any() or name == "hard", "the source is read"


@pytest.mark.parametrize("name", ["hard", "full", "mix(hard, local(window=3))"])
def test_a_source_as_long_as_the_target_is_not_taken_for_it(name):
    """What is valid of the source says nothing of the target, and what is padding there enters no log-probability."""
    model = make(name, where=("cross",), layers=1)
    tokens, source, _ = batch()
    source, valid = source[:, :T], jnp.arange(T) < jnp.array([[T], [4], [6]])
    step = lambda cache, token: model.step(token, cache)[::-1]
    _, logits = jax.lax.scan(step, model.start(3, T, source=source, source_valid=valid), tokens.T)
    np.testing.assert_allclose(logits.swapaxes(0, 1), model(tokens, source=source, source_valid=valid), rtol=0, atol=1e-4)
    if name == "hard":
        target_valid = jnp.arange(T) < jnp.array([[T], [T], [0]])
        inner = nnx.merge(*nnx.split(model))
        inner(tokens, source=source, source_valid=valid, valid_BT=target_valid, key=jax.random.key(0))
        (log_prob,) = jax.tree.leaves(nnx.state(inner, ScoreFunction))
        assert float(log_prob[2]) == 0 and log_prob.shape == (3,)


def test_a_list_is_held_against_the_deepest_stack_it_stands_in():
    model = make("[local(window=1), full, linear]", layers=1, where=("encoder",), encoder_layers=3)
    assert [block.mixer.attention.variant.name for block in model.encoder.blocks] == ["local", "full", "linear"]
    make("[local(window=1), full, linear]", layers=1, encoder_layers=3)
    with pytest.raises(UserError, match="a list of 3 variants, where encoder_layers=2"):
        make("[local(window=1), full, linear]", layers=5, where=("encoder",), encoder_layers=2)
    with pytest.raises(UserError, match="a list of 2 variants, where layers=1"):
        make("full", layers=1, encoder_layers=4, cross="[full, linear]")


@pytest.mark.parametrize("name", ["retention", "lsh", "mix(full, tree)"])
def test_cross_attention_refuses_what_cannot_cross_whatever_the_lengths(name):
    for source_len in (T, T + 3):
        with pytest.raises(Unsupported, match="cannot attend across sequences"):
            make(name, where=("cross",), source_len=source_len)


def test_a_source_is_given_to_what_reads_one():
    tokens, source, _ = batch()
    for model, given, message in ((make("full"), None, "was given none"), (make("full", source_len=0), source, "reads none")):
        for use in (lambda: model(tokens, source=given), lambda: model.start(3, T, source=given)):
            with pytest.raises(UserError, match=message):
                use()


def test_what_is_not_causal_serves_in_the_encoder_alone():
    with pytest.raises(Unsupported, match="linformer cannot be causal"):
        make("linformer(rank=4)")
    assert names(make("linformer(rank=4)", where=("encoder",)))["encoder"] == ["linformer"] * 2


def test_padding_of_the_source_changes_nothing():
    model = make()
    tokens, source, valid = batch()
    run = jax.jit(lambda source: model(tokens, source=source, source_valid=valid))
    np.testing.assert_array_equal(run(source), run(jnp.where(valid, source, (source + 3) % U)))


def test_later_targets_are_not_seen_and_the_whole_source_is():
    model = make(tie_embeddings=False)
    tokens, source, valid = batch()

    def output(noise_T, noise_S):
        inner = nnx.merge(*nnx.split(model))
        plain, plain_source = inner.embedding, inner.encoder.embedding
        inner.embedding = lambda ids, start=0: plain(ids, start) + noise_T
        inner.encoder.embedding = lambda ids: plain_source(ids) + noise_S
        return inner(tokens, source=source, source_valid=valid)[:, 4].sum()

    by_target, by_source = jax.jit(jax.grad(output, (0, 1)))(jnp.zeros((3, T, 16)), jnp.zeros((3, S, 16)))
    assert (by_target[:, 5:] == 0).all() and (by_target[:, :5] != 0).any(axis=-1).all()
    np.testing.assert_array_equal((by_source != 0).any(axis=-1), valid)


def test_one_table_may_serve_source_and_target():
    separate, shared = (param_counts(make(source_vocab=V, share_embeddings=share))["total"] for share in (False, True))
    assert separate - shared == V * 16
    with pytest.raises(UserError, match="share_embeddings=True: 40 source tokens do not fit 11"):
        make(source_vocab=40, share_embeddings=True)
    model = make(source_vocab=V, share_embeddings=True)
    _, params, _ = nnx.split(model, nnx.Param, ...)
    merged = nnx.merge(*nnx.split(model))
    assert merged.encoder.embedding.tokens is merged.embedding.tokens
    assert jax.tree.leaves(params)


def test_a_decoder_alone_draws_what_it_drew_without_an_encoder():
    """The parts of the decoder that both have start the same: an encoder draws after them."""
    alone = Transformer(config.Model(D=16, layers=2, N=2, positions="sinusoidal"), variant=parse_variant("full"), inputs_vocab=V, num_outputs=V, max_len=T, causal=True, per_token=True, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(alone.embedding.tokens[...], make().embedding.tokens[...])


def test_dropout_and_remat():
    tokens, source, valid = batch()
    model = make(dropout=0.5)
    a, b = (model(tokens, source=source, source_valid=valid, key=jax.random.key(n)) for n in (0, 1))
    assert (np.asarray(a) != np.asarray(b)).any()

    def gradients(model):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        return jax.grad(lambda params: jnp.square(nnx.merge(graph, params, rest)(tokens, source=source, source_valid=valid)).mean())(params)

    kept, again = (jax.tree.leaves(gradients(make(remat=remat))) for remat in (False, True))
    assert len(kept) == len(again)
    for a, b in zip(kept, again):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_flops_and_memory_count_both_sides():
    model = make()
    c, B = model.config, 3
    D, F = c.D, 4 * c.D
    per_target = 2 * (4 * D * D + 2 * D * D + 2 * D * F)  # self-attention; queries and output of cross-attention; feed-forward
    per_source = 2 * (4 * D * D + 2 * D * F) + 2 * 2 * D * D  # the encoder; keys and values of cross-attention
    expected = 6 * B * (T * (per_target + V * D) + S * per_source)
    flops = model.flops_per_step(B, T)
    assert flops["model"] - flops["attention"] == expected
    pairs = 2 * (T * (T + 1) / 2 + T * S + S * S)
    assert flops["attention"] == 3 * 4 * B * D * pairs
    assert model.activation_bytes(B, T) > make(encoder_layers=1).activation_bytes(B, T)


def test_the_schedule_of_the_paper():
    """lr sqrt(warmup / step) after `warmup` linear steps: eq. 3 of Vaswani et al. 2017 up to its constant."""
    for step, share in ((0, 0.25), (1, 0.5), (3, 1.0), (15, 0.5), (63, 0.25)):
        train = config.Train(steps=100, warmup=4, lr=0.1, schedule="inverse_sqrt", weight_decay=0.0, clip=1e9, b1=0.0, b2=0.0)
        optimizer = make_optimizer(train)
        params = {"x": jnp.zeros(1)}
        state = optimizer.init(params)
        state = jax.tree.map(lambda x: jnp.asarray(step, x.dtype) if x.ndim == 0 else x, state)
        update, _ = optimizer.update({"x": jnp.ones(1)}, state, params)
        assert float(-update["x"][0]) == pytest.approx(0.1 * share, rel=1e-3)
    with pytest.raises(UserError, match="warmup=0: must be at least 1"):
        config.Train(warmup=0, schedule="inverse_sqrt")
