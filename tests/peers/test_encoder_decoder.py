"""Our encoder, decoder and cross-attention against torch.nn.Transformer, and our beam search against that of transformers, weights copied.

torch's layers have biases in their projections, which ours do not: there they are zero.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from peers import peer

torch = peer("torch")

from attn_zoo import config
from attn_zoo.attention import parse_variant
from attn_zoo.models import Transformer
from attn_zoo.models.generation import Beam, beam_search
from attn_zoo.models.transformer import run_blocks
from peers.agreement import agree, normal

D, N, F, T, S = 16, 4, 24, 7, 9


def tensor(x, *shape):
    return torch.tensor(np.array(x).reshape(shape) if shape else np.array(x))


def copy_attention(ours, theirs):
    """Query, key and value side by side in in_proj_weight; torch's matrices are transposed."""
    theirs.in_proj_weight.data = torch.cat([tensor(x[...], D, D).T for x in (ours.query, ours.key, ours.value)])
    theirs.out_proj.weight.data = tensor(ours.out[...], D, D).T.contiguous()
    theirs.in_proj_bias.data.zero_()
    theirs.out_proj.bias.data.zero_()


def copy_norm(ours, theirs):
    theirs.weight.data, theirs.bias.data = tensor(ours.scale[...]), tensor(ours.bias[...])


def copy_block(block, layer):
    copy_attention(block.mixer, layer.self_attn)
    norms = [block.attention_norm, *([block.cross_norm] if block.has_cross else []), block.ffn_norm]
    if block.has_cross:
        copy_attention(block.cross, layer.multihead_attn)
    for n, norm in enumerate(norms):
        copy_norm(norm, getattr(layer, f"norm{n + 1}"))
    layer.linear1.weight.data, layer.linear2.weight.data = tensor(block.ffn.up[...]).T.contiguous(), tensor(block.ffn.down[...]).T.contiguous()
    layer.linear1.bias.data.zero_()
    layer.linear2.bias.data.zero_()


def both(norm_position):
    model = config.Model(D=D, layers=2, N=N, F=F, ffn="relu", norm_position=norm_position, positions="sinusoidal", tie_embeddings=False)
    sizes = dict(inputs_vocab=11, num_outputs=11, max_len=T, source_vocab=11, source_len=S)
    ours = Transformer(model, variant=parse_variant("full"), causal=True, per_token=True, rngs=nnx.Rngs(0), **sizes)
    graph, params, rest = nnx.split(ours, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)  # norms that are not the identity
    ours = nnx.merge(graph, tree.unflatten([x + 0.2 * normal(*x.shape, seed=n) for n, x in enumerate(leaves)]), rest)
    theirs = torch.nn.Transformer(D, N, 2, 2, F, dropout=0.0, activation="relu", batch_first=True, norm_first=norm_position == "pre").eval()
    for stack, layers in ((ours.encoder, theirs.encoder), (ours, theirs.decoder)):
        for block, layer in zip(stack.blocks, layers.layers):
            copy_block(block, layer)
        if norm_position == "pre":
            copy_norm(stack.final_norm, layers.norm)
        else:
            layers.norm = None  # torch normalizes once more behind post-norm layers; the paper does not
    return ours, theirs


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_encoder_decoder_and_cross_attention(norm_position):
    ours, theirs = both(norm_position)
    valid_BS = np.arange(S) < np.array([[S], [5]])
    graph, state = nnx.split(ours)

    def run(source_BSD, target_BTD):
        model = nnx.merge(graph, state)
        memory_BSD = run_blocks(model.encoder, source_BSD, jnp.asarray(valid_BS), None)
        return run_blocks(model, target_BTD, None, None, memory_BSD, jnp.asarray(valid_BS))

    hidden = torch.tensor(~valid_BS)
    causal = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)

    def run_theirs(source, target):
        return theirs(source, target, tgt_mask=causal, src_key_padding_mask=hidden, memory_key_padding_mask=hidden)

    agree(run, run_theirs, normal(2, S, D), normal(2, T, D, seed=1))


def llama(seed):
    """A tiny LLaMA, whose layers are ours without a difference: RMSNorm, rotary positions, SwiGLU, no biases."""
    transformers = peer("transformers")
    sizes = dict(vocab_size=17, hidden_size=D, intermediate_size=F, num_hidden_layers=2, num_attention_heads=N, max_position_embeddings=32)
    settings = transformers.LlamaConfig(**sizes, rms_norm_eps=1e-6, tie_word_embeddings=False, initializer_range=0.5, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(settings).eval()


def copied(theirs):
    model = config.Model(D=D, layers=2, N=N, F=F, ffn="swiglu", norm="rmsnorm", positions="rotary", tie_embeddings=False)
    ours = Transformer(model, variant=parse_variant("full"), inputs_vocab=17, num_outputs=17, max_len=32, causal=True, per_token=True, rngs=nnx.Rngs(0))
    array = lambda x: jnp.asarray(x.detach().numpy())
    ours.embedding.tokens[...] = array(theirs.model.embed_tokens.weight) / D**0.5  # ours are scaled at the input
    ours.readout[...] = array(theirs.lm_head.weight)
    ours.final_norm.scale[...] = array(theirs.model.norm.weight)
    for block, layer in zip(ours.blocks, theirs.model.layers):
        for name, projection in (("query", layer.self_attn.q_proj), ("key", layer.self_attn.k_proj), ("value", layer.self_attn.v_proj)):
            getattr(block.mixer, name)[...] = array(projection.weight).T.reshape(D, N, D // N)
        block.mixer.out[...] = array(layer.self_attn.o_proj.weight).T.reshape(N, D // N, D)
        block.attention_norm.scale[...], block.ffn_norm.scale[...] = array(layer.input_layernorm.weight), array(layer.post_attention_layernorm.weight)
        block.ffn.gate[...], block.ffn.up[...], block.ffn.down[...] = (array(x.weight).T for x in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj))
    return ours


@pytest.mark.parametrize("seed, width, alpha", [(0, 4, 1.0), (1, 3, 0.6), (2, 5, 0.0), (3, 4, 2.0)])
def test_beam_search(seed, width, alpha):
    theirs = llama(seed)
    ours = copied(theirs)
    prompt, max_len = np.random.default_rng(seed).integers(3, 17, (3, 4)), 14
    np.testing.assert_allclose(ours(jnp.asarray(prompt)), theirs(torch.tensor(prompt)).logits.detach(), rtol=0, atol=1e-4)
    arguments = dict(num_beams=width, num_return_sequences=width, length_penalty=alpha, max_length=max_len, do_sample=False, early_stopping=False)
    found = theirs.generate(torch.tensor(prompt), attention_mask=torch.ones(prompt.shape, dtype=torch.long), return_dict_in_generate=True, output_scores=True, **arguments)
    beam = Beam(width=width, alpha=alpha, penalty="power")
    tokens, scores = jax.jit(lambda p: beam_search(ours.step, ours.start(len(p), max_len), p, max_len, end=2, beam=beam))(jnp.asarray(prompt))
    sequences = np.zeros((3, width, max_len), int)
    theirs_tokens = found.sequences.numpy().reshape(3, width, -1)
    sequences[:, :, : theirs_tokens.shape[2]] = theirs_tokens
    ended_before = np.cumsum(sequences == 2, axis=-1) - (sequences == 2) > 0
    sequences[ended_before] = 0  # it repeats the end instead
    np.testing.assert_allclose(scores, found.sequences_scores.numpy().reshape(3, width), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(tokens, sequences)
