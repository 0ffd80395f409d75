"""The Hugging Face models against `block`, `local`, `global_window`, `lsh` and `nystrom`: one self-attention layer of each, its weights copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peers import peer

transformers = peer("transformers")
big_bird = peer("transformers.models.big_bird.modeling_big_bird")
longformer = peer("transformers.models.longformer.modeling_longformer")
nystromformer = peer("transformers.models.nystromformer.modeling_nystromformer")
reformer = peer("transformers.models.reformer.modeling_reformer")

from attn_zoo import make_attention
from attn_zoo.attention.block import Options, pattern
from attn_zoo.attention.lsh import bucket_factors
from attn_zoo.ops.blocked import blocked_attention
from attn_zoo.ops.patterns import BlockTable, Prefix
from peers.agreement import agree, linear, merge_heads, normal, split_heads, torch

B, N, H = 2, 2, 8
D = N * H


def projected(x, module, *names):
    """The module's linear layers of x, in heads."""
    return [split_heads(linear(getattr(module, name))(x), N) for name in names]


def with_random_biases(module):
    """A module's linear layers start with biases of zero or near it; with others a bias left out would show."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear) and layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
    return module


class TestBigBird:
    """Their first and last block are global, the window is three blocks, and every head draws random blocks of its own.

    They draw in training only. In evaluation their plan lists block 0 in place of every random block, so that its keys, which all queries see
    already, count 1 + random_blocks times in the softmax: nothing of the paper corresponds to that, and it is not compared.
    """

    block, C, random_blocks = 4, 14, 2
    T = block * C

    def module(self):
        config = transformers.BigBirdConfig(
            hidden_size=D, num_attention_heads=N, block_size=self.block, num_random_blocks=self.random_blocks, max_position_embeddings=self.T
        )
        return with_random_biases(big_bird.BigBirdBlockSparseAttention(config, seed=3)).train()

    def theirs(self, module, valid_BT):
        blocked, band, rows, keys = big_bird.BigBirdModel.create_masks_for_block_sparse_attn(torch.tensor(valid_BT, dtype=torch.float32), self.block)
        return lambda x: module(x, band_mask=band, from_mask=rows, to_mask=keys, from_blocked_mask=blocked, to_blocked_mask=blocked)[0]

    def test_pattern_with_their_random_blocks(self, monkeypatch):
        """Head by head, since their heads draw apart and a Pattern is for all heads."""
        module, plans = self.module(), []
        draw = module._bigbird_block_rand_mask_with_head
        monkeypatch.setattr(module, "_bigbird_block_rand_mask_with_head", lambda **kwargs: plans.append(draw(**kwargs)) or plans[-1])
        valid_BT = np.arange(self.T) < np.array([[self.T], [37]])
        valid_BT[1, 9] = False
        theirs = self.theirs(module, valid_BT)
        theirs(torch.zeros(B, self.T, D))  # draws; the seed of a module fixes what it draws
        everything, last = tuple(range(self.C)), self.C - 1

        def pattern_of(plan):
            rows = [tuple(range(I - 1, I + 2)) + (last,) + tuple(drawn.tolist()) for I, drawn in enumerate(plan, start=1)]
            return Prefix(self.block) | BlockTable(self.block, (everything, *rows, everything))

        patterns = [pattern_of(plan) for plan in plans[0]]
        assert len(patterns) == N and patterns[0] != patterns[1]

        def ours(x):
            q, k, v = projected(x, module, "query", "key", "value")
            heads = [blocked_attention(*(x[:, :, n : n + 1] for x in (q, k, v)), pattern=p, valid_BS=jnp.asarray(valid_BT))[0] for n, p in enumerate(patterns)]
            return merge_heads(jnp.concatenate(heads, axis=2))

        agree(ours, theirs, normal(B, self.T, D), rows_BT=valid_BT)
        assert all((a == b).all() for a, b in zip(plans[0], plans[-1])), "the plan compared is the plan drawn first"

    def test_block_with_its_random_blocks_in_place_of_theirs(self, monkeypatch):
        """Their last block is padding here: `block` has its global blocks at the start alone."""
        module = self.module()
        valid_BT = np.tile(np.arange(self.T) < self.T - self.block, (B, 1))
        seen = pattern(Options(self.block, 1, 1, self.random_blocks), self.T, self.T, False)
        drawn = [[J for J in seen.b.table[I] if abs(I - J) > 1] for I in range(1, self.C - 1)]
        monkeypatch.setattr(module, "_bigbird_block_rand_mask_with_head", lambda **_: [np.array(drawn)] * N)
        attention = make_attention(f"block(block={self.block}, random_blocks={self.random_blocks})", num_heads=N, head_dim=H, max_len=self.T)

        def ours(x):
            return merge_heads(attention(*projected(x, module, "query", "key", "value"), valid_BS=jnp.asarray(valid_BT)))

        agree(ours, self.theirs(module, valid_BT), normal(B, self.T, D), rows_BT=valid_BT)


class TestLongformer:
    """Their attention_window is both sides together."""

    T, window = 48, 4

    def module(self):
        config = transformers.LongformerConfig(
            hidden_size=D, num_attention_heads=N, attention_window=[2 * self.window], attention_probs_dropout_prob=0.0, num_hidden_layers=1
        )
        return with_random_biases(longformer.LongformerSelfAttention(config, layer_id=0))

    def theirs(self, module, valid_BT, global_BT):
        valid, everywhere = torch.tensor(valid_BT), torch.tensor(global_BT)
        mask = torch.where(everywhere, 10000.0, torch.where(valid, 0.0, -10000.0))
        return lambda x: module(x, mask, ~valid, everywhere, bool(everywhere.any()))[0]

    def valid(self):
        valid_BT = np.arange(self.T) < np.array([[self.T], [37]])
        valid_BT[1, 9] = False
        return valid_BT

    def test_window_is_local(self):
        module, valid_BT = self.module(), self.valid()
        attention = make_attention(f"local(window={self.window})", num_heads=N, head_dim=H, max_len=self.T)

        def ours(x):
            return merge_heads(attention(*projected(x, module, "query", "key", "value"), valid_BS=jnp.asarray(valid_BT)))

        agree(ours, self.theirs(module, valid_BT, np.zeros_like(valid_BT)), normal(B, self.T, D), rows_BT=valid_BT)

    @pytest.mark.parametrize("separate", [False, True], ids=["common_projections", "separate_projections"])
    def test_global_tokens_are_global_window(self, separate):
        """Their global projections are layers of their own, ours maps of the common ones: theirs are set to the product of both."""
        count = 5
        module, valid_BT = self.module(), self.valid()
        attention = make_attention(f"global_window(window={self.window}, globals={count}, separate={separate})", num_heads=N, head_dim=H, max_len=self.T)
        for seed, name in enumerate(("query", "key", "value")):
            map_NHJ = np.tile(np.eye(H, dtype=np.float32), (N, 1, 1)) + separate * normal(N, H, H, seed=seed) / H
            if separate:
                getattr(attention, f"{name}_map")[...] = jnp.asarray(map_NHJ)
            common, own = getattr(module, name), getattr(module, f"{name}_global")
            product = lambda x: torch.einsum("NHJ,NH...->NJ...", torch.tensor(map_NHJ), x.detach().unflatten(0, (N, H))).flatten(0, 1)
            own.weight, own.bias = (torch.nn.Parameter(product(x)) for x in (common.weight, common.bias))

        def ours(x):
            return merge_heads(attention(*projected(x, module, "query", "key", "value"), valid_BS=jnp.asarray(valid_BT)))

        global_BT = np.tile(np.arange(self.T) < count, (B, 1))
        agree(ours, self.theirs(module, valid_BT, global_BT), normal(B, self.T, D), rows_BT=valid_BT)


class TestReformer:
    """One round of hashing with the same rotations. Further rounds count a pair again that met before, where the paper counts it once.

    Their first chunk looks back to the last one: the last one is padding, which no query sees.
    """

    @pytest.mark.parametrize("T, chunk", [(48, 8), (136, 2)], ids=["one_factor", "two_factors"])
    @pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
    def test_one_round_is_lsh(self, causal, T, chunk, monkeypatch):
        factors = bucket_factors(T, chunk)
        config = transformers.ReformerConfig(
            hidden_size=D,
            num_attention_heads=N,
            attention_head_size=H,
            lsh_attn_chunk_length=chunk,
            num_hashes=1,
            num_buckets=list(factors) if len(factors) > 1 else factors[0],
            is_decoder=causal,
            lsh_attention_probs_dropout_prob=0.0,
        )
        module = reformer.LSHSelfAttention(config)
        rotations_1NHC = jax.random.normal(jax.random.key(0), (1, N, H, sum(factors) // 2))

        def drawn(shape, **_):
            assert shape == (N, H, 1, sum(factors) // 2)
            return torch.tensor(np.transpose(rotations_1NHC, (1, 2, 0, 3)))

        monkeypatch.setattr(torch, "randn", drawn)
        valid_BT = np.arange(T) < np.array([[T - chunk], [T // 2 + 1]])
        valid_BT[1, 9] = False
        attention = make_attention(f"lsh(num_hashes=1, bucket_size={chunk})", num_heads=N, head_dim=H, max_len=T, causal=causal)

        def ours(x):
            qk, v = projected(x, module, "query_key", "value")
            return merge_heads(attention(qk, qk, v, valid_BS=jnp.asarray(valid_BT)))

        agree(ours, lambda x: module(x, attention_mask=torch.tensor(valid_BT)).hidden_states, normal(B, T, D, seed=2), rows_BT=valid_BT)


class TestNystromformer:
    """Their pseudo-inverse starts from the largest norm in the batch, unless told to take each matrix's own, as in the paper and here.

    Padding is not compared: theirs is part of the landmarks, and hidden from them only where they look at keys.
    """

    def test_landmarks_are_nystrom(self):
        T, landmarks, taps = 24, 6, 5
        config = transformers.NystromformerConfig(
            hidden_size=D, num_attention_heads=N, num_landmarks=landmarks, segment_means_seq_len=T, conv_kernel_size=taps, attention_probs_dropout_prob=0.0
        )
        module = with_random_biases(nystromformer.NystromformerSelfAttention(config))
        module.init_option = "exact"  # as inv_coeff_init_option should set it, which raises an error in this version
        attention = make_attention(f"nystrom(landmarks={landmarks}, residual_kernel={taps})", num_heads=N, head_dim=H, max_len=T)
        attention.taps[...] = jnp.asarray(module.conv.weight.detach()[:, 0, :, 0])
        ours = lambda x: merge_heads(attention(*projected(x, module, "query", "key", "value")))
        agree(ours, lambda x: module(x)[0], normal(B, T, D))
