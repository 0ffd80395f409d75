"""Generation: steps of a model are its parallel form, and what is chosen from them follows the definitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import config
from attn_zoo.attention import parse_variant
from attn_zoo.models import Transformer, read_variant
from attn_zoo.models.generation import GREEDY, NEG, Beam, Sampling, beam_search, restrict, sample
from attn_zoo.spec import Unsupported, UserError

V, L = 7, 12


def make_model(variant="full", *, source=False, max_len=L, seed=0, **fields):
    model = config.Model(**({"D": 16, "layers": 2, "N": 2, "positions": "learned"} | fields))
    sources = dict(source_vocab=9, source_len=10) if source else {}
    made = Transformer(model, variant=parse_variant(variant), inputs_vocab=V, num_outputs=V, max_len=max_len, causal=True, per_token=True, rngs=nnx.Rngs(seed), **sources)
    made.embedding.tokens[...] = 30 * made.embedding.tokens[...]  # logits that tell tokens apart
    return made


def draw(B, n, vocab, seed=0):
    return jax.random.randint(jax.random.key(seed), (B, n), 0, vocab)


def stepped(model, tokens, **source):
    graph, state = nnx.split(model)

    @jax.jit
    def run(tokens):
        model = nnx.merge(graph, state)
        step = lambda cache, token: model.step(token, cache)[::-1]
        return jax.lax.scan(step, model.start(len(tokens), tokens.shape[1], **source), tokens.T)[1].swapaxes(0, 1)

    return run(tokens)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "sinusoidal_concat", "rotary", "none"])
def test_steps_of_a_decoder_equal_its_parallel_form(positions):
    model, tokens = make_model("[local(window=3), linear]", positions=positions), draw(3, L, V)
    np.testing.assert_allclose(stepped(model, tokens), jax.jit(lambda tokens: model(tokens))(tokens), rtol=0, atol=2e-4)


@pytest.mark.parametrize("norm_position, ffn", [("pre", "none"), ("post", "swiglu")])
def test_steps_of_an_encoder_decoder_equal_its_parallel_form(norm_position, ffn):
    model = make_model(source=True, norm_position=norm_position, ffn=ffn)
    tokens, source = draw(3, L, V), draw(3, 10, 9, seed=1)
    valid = jnp.arange(10) < jnp.array([[10], [4], [7]])
    expected = jax.jit(lambda tokens: model(tokens, source=source, source_valid=valid))(tokens)
    np.testing.assert_allclose(stepped(model, tokens, source=source, source_valid=valid), expected, rtol=0, atol=2e-4)


def generate(model, prompt, max_len=L, source=None, **arguments):
    return jax.jit(lambda prompt: sample(model.step, model.start(len(prompt), max_len, **source or {}), prompt, max_len, **arguments))(prompt)


# A key-value cache, a ring, states that do not grow, keys that can still be seen; and what reads a source, of which each body has a state of its own.
DECODERS = ["full", "[local(window=3), linear]", "adaptive_span(max_span=6, init=3, ramp=2)", "delta", "strided(stride=4)"]
READING = ["transformer(full)", "transformer(local(window=3), linear, where=('decoder', 'cross'))", "recurrent(additive)", "recurrent(local_p(window=2), cell='lstm')", "convolutional(dilated)"]
GENERATING = [*DECODERS, *READING]


def make_any(text, B, seed=0):
    """A decoder, or, of a row that names its body, an encoder and decoder; and the keywords of its sources."""
    if text in DECODERS:
        return make_model(text, seed=seed), {}
    entry = read_variant(text, config.Model(D=16, layers=2, N=2, positions="learned"))
    sizes = dict(inputs_vocab=V, num_outputs=V, max_len=L, causal=True, per_token=True, source_vocab=9, source_len=10, image_shape=None)
    model = entry.body.build(entry.model, variant=list(entry.specs), attention=config.Attention(), rngs=nnx.Rngs(seed), **sizes)
    read_out = model.embedding.tokens if hasattr(model, "embedding") else model.readout
    read_out[...] = 30 * read_out[...]
    return model, {"source": draw(B, 10, 9, seed=1), "source_valid": jnp.arange(10) < jnp.arange(3, 3 + B)[:, None]}


@pytest.mark.parametrize("variant", GENERATING)
def test_greedy_with_a_cache_is_greedy_by_feeding_the_sequence_again(variant):
    (model, source), prompt = make_any(variant, 2), draw(2, 3, V)
    tokens, log_prob = generate(model, prompt, source=source)
    assert len(np.unique(tokens)) > 2
    expected, total = prompt, np.zeros(2)
    forward = jax.jit(lambda tokens: model(tokens, **source))
    for t in range(3, L):
        log_p = jax.nn.log_softmax(forward(jnp.pad(expected, ((0, 0), (0, L - t))))[:, t - 1])  # what stands behind is not seen
        expected = jnp.concatenate([expected, log_p.argmax(axis=-1)[:, None]], axis=1)
        total += np.asarray(log_p.max(axis=-1))
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(log_prob, total, atol=1e-3)


def test_prompts_of_different_lengths_do_not_disturb_each_other():
    model, prompt = make_model(), draw(3, 6, V)
    tokens, log_prob = generate(model, prompt, lengths_B=jnp.array([6, 1, 4]))
    for row, length in enumerate((6, 1, 4)):
        alone, alone_log_prob = generate(model, prompt[row : row + 1, :length])
        np.testing.assert_array_equal(tokens[row], alone[0])
        np.testing.assert_allclose(log_prob[row], alone_log_prob[0], atol=1e-4)


def test_generation_stops_at_the_end_and_pads_behind_it():
    model, prompt = make_model(), draw(4, 2, V)
    free, _ = generate(model, prompt)
    end = int(free[0, 4])
    tokens, log_prob = generate(model, prompt, end=end, pad=0)
    for row in np.asarray(tokens):
        ends = np.flatnonzero(row[2:] == end)
        if len(ends):
            assert (row[2 + ends[0] + 1 :] == 0).all()
    first = 2 + int(np.flatnonzero(np.asarray(free[0, 2:]) == end)[0])
    np.testing.assert_array_equal(tokens[0, : first + 1], free[0, : first + 1])
    assert log_prob[0] > generate(model, prompt)[1][0], "nothing is counted behind the end"


def test_sampling_at_a_temperature_follows_the_softmax():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    step = lambda tokens_B, cache: (jnp.broadcast_to(logits, (len(tokens_B), 3)), cache)
    tokens, log_prob = sample(step, {}, jnp.zeros((4000, 1), jnp.int32), 2, sampling=Sampling(), key=jax.random.key(0))
    shares = np.bincount(tokens[:, 1], minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=4 * np.sqrt(0.25 / 4000))
    np.testing.assert_allclose(log_prob, logits[tokens[:, 1]], atol=1e-6)


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(top_k=2), [0, 1]),
        (Sampling(top_p=0.5), [0]),
        (Sampling(top_p=0.51), [0, 1]),
        (Sampling(top_p=0.9), [0, 1, 2]),
        (Sampling(top_p=1e-6), [0]),
        (Sampling(temperature=0.25, top_p=0.9), [0, 1]),  # 0.5^4 : 0.3^4 : ...: the first holds 0.86
        (Sampling(top_k=10), [0, 1, 2, 3]),
    ],
)
def test_top_k_and_nucleus_keep_what_they_should(sampling, kept):
    restricted = restrict(jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])), sampling)
    assert np.flatnonzero(np.asarray(restricted[0]) > NEG / 2).tolist() == kept


def test_what_is_cold_is_greedy_and_equal_tokens_are_not_more_than_k():
    logits = jnp.array([[2.0, 3.0, 3.0, -1.0]])
    for sampling in (Sampling(temperature=1e-40), Sampling(top_k=1), Sampling(top_p=0.1)):
        restricted = restrict(logits, sampling)
        assert restricted.argmax() == 1 and not np.isnan(restricted).any()
    assert np.flatnonzero(np.asarray(restrict(logits, Sampling(top_k=1))[0]) > NEG / 2).tolist() == [1]


def exhaustive(log_p, prompt, max_len, end, beam):
    """All continuations of a prompt with their scores, best first: {tokens: score}, tokens ending at `end` or at max_len."""
    scores = {}
    for length in range(1, max_len - len(prompt) + 1):
        for continuation in itertools.product(range(V), repeat=length):
            if end in continuation[:-1] or (continuation[-1] != end and length < max_len - len(prompt)):
                continue
            total = sum(float(log_p((*prompt, *continuation[:n]))[token]) for n, token in enumerate(continuation))
            scores[(*prompt, *continuation)] = float(beam.normalize(jnp.float32(total), length))
    return sorted(scores.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("penalty, alpha", [("gnmt", 0.6), ("power", 1.0), ("gnmt", 0.0)])
def test_a_wide_beam_finds_the_best_of_all_continuations(penalty, alpha):
    model, max_len, end = make_model(), 5, 3
    beam = Beam(width=60, alpha=alpha, penalty=penalty)  # wider than all prefixes that can matter
    cache = {}

    def log_p(prefix):
        if prefix not in cache:
            cache[prefix] = np.asarray(jax.nn.log_softmax(forward(jnp.array([prefix + (0,) * (max_len - len(prefix))]))[0, len(prefix) - 1]))
        return cache[prefix]

    forward = jax.jit(lambda tokens: model(tokens))
    prompt = (1, 2)
    expected = exhaustive(log_p, prompt, max_len, end, beam)
    tokens, scores = jax.jit(lambda p: beam_search(model.step, model.start(1, max_len), p, max_len, end=end, beam=beam))(jnp.array([prompt]))
    for n in range(5):
        best, score = expected[n]
        np.testing.assert_array_equal(tokens[0, n, : len(best)], best)
        assert float(scores[0, n]) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("variant", GENERATING)
def test_a_beam_of_width_one_is_greedy(variant):
    (model, source), prompt = make_any(variant, 5, seed=3), draw(5, 2, V, seed=4)
    end = 6
    expected, _ = generate(model, prompt, source=source, end=end)
    tokens, _ = jax.jit(lambda p: beam_search(model.step, model.start(len(p), L, **source), p, L, end=end, beam=Beam(width=1)))(prompt)
    np.testing.assert_array_equal(tokens[:, 0], expected)


@pytest.mark.parametrize("variant", GENERATING)
def test_hypotheses_have_the_scores_that_the_parallel_form_gives_them(variant):
    """So the rows of a state went with the tokens that they were made of."""
    (model, source), prompt = make_any(variant, 2, seed=3), draw(2, 2, V, seed=4)
    beam = Beam(width=3, alpha=0.0)
    tokens_BWL, scores_BW = jax.jit(lambda p: beam_search(model.step, model.start(len(p), L, **source), p, L, end=V, beam=beam))(prompt)  # nothing is V
    assert len({tuple(row) for row in np.asarray(tokens_BWL).reshape(-1, L).tolist()}) == 6
    for n in range(beam.width):
        log_p = jax.nn.log_softmax(model(tokens_BWL[:, n], **source))[:, 1:-1]
        expected = jnp.take_along_axis(log_p, tokens_BWL[:, n, 2:, None], axis=-1)[..., 0].sum(axis=1)
        np.testing.assert_allclose(scores_BW[:, n], expected, atol=2e-3)


def test_rows_of_a_batch_are_searched_apart():
    model, prompt = make_model(source=True), draw(3, 2, V)
    source, end = draw(3, 10, 9, seed=1), 3
    search = jax.jit(lambda p, s: beam_search(model.step, model.start(len(p), L, source=s), p, L, end=end, beam=Beam(width=3)))
    tokens, scores = search(prompt, source)
    for row in range(3):
        alone, alone_scores = search(prompt[row : row + 1], source[row : row + 1])
        np.testing.assert_array_equal(tokens[row], alone[0])
        np.testing.assert_allclose(scores[row], alone_scores[0], atol=1e-4)


def test_a_row_that_is_done_is_not_searched_on_for_the_sake_of_others():
    """Rows stop at different lengths, and a length penalty likes long hypotheses: 64 random tables of logits by position and token."""
    rows, vocabulary, length, end = 64, 5, 12, 0
    tables = jnp.asarray(np.random.default_rng(0).normal(size=(rows, length, vocabulary, vocabulary)) * 2, jnp.float32)

    def step(tokens, cache):
        return cache["table"][jnp.arange(len(tokens)), cache["t"], tokens], cache | {"t": cache["t"] + 1}

    @jax.jit
    def search(tables):
        cache = {"t": jnp.zeros((), jnp.int32), "table": tables}
        return beam_search(step, cache, jnp.ones((len(tables), 1), jnp.int32), length, end=end, beam=Beam(width=3, alpha=1.0, penalty="power"))

    together = search(tables)
    alone = [search(tables[row : row + 1]) for row in range(rows)]
    lengths = (together[0][:, 0] != 0).sum(axis=1)
    assert len(set(lengths.tolist())) > 3
    for got, expected in zip(together, zip(*alone)):
        np.testing.assert_array_equal(got, jnp.concatenate(expected))


def test_mistakes_are_named():
    model, prompt = make_model(), draw(2, 3, V)
    with pytest.raises(UserError, match="must be at least the prompt's length, 3"):
        sample(model.step, model.start(2, 2), prompt, 2)
    for generate in (sample, lambda *arguments: beam_search(*arguments, end=0)):
        with pytest.raises(UserError, match="max_len=8: must be at most 7: the cache was made for 6 steps"):
            generate(model.step, model.start(2, 6), prompt, 8)
    with pytest.raises(UserError, match=f"max_len={L + 1} is over the max_len={L}"):
        model.start(2, L + 1)
    with pytest.raises(UserError, match="needs a random key"):
        sample(model.step, model.start(2, L), prompt, L, sampling=Sampling())
    for mistake in (dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5)):
        with pytest.raises(UserError, match=next(iter(mistake))):
            Sampling(**mistake)
    with pytest.raises(UserError, match="penalty='length': must be one of 'gnmt', 'power'"):
        Beam(penalty="length")
    encoder = Transformer(config.Model(D=8, layers=1, N=2), variant=parse_variant("full"), inputs_vocab=V, num_outputs=V, max_len=L, causal=False, per_token=True, rngs=nnx.Rngs(0))
    with pytest.raises(Unsupported, match="without a causal mask"):
        encoder.start(1, L)
    assert GREEDY.temperature == 0
