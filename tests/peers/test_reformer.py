"""The reformer-pytorch package against `lsh`: several rounds, with pairs that met in more than one counted once (allow_duplicate_attention=False).

Four differences are taken out. It makes half as many buckets as the paper: it is asked for twice as many. Its scores carry an H^-1/2 that the paper's,
of normalised keys, do not: our queries get it. Its first chunk looks back to the last one of the round before: the last one is padding, which no query sees.
Its score of a token with itself, -5e4, leaves float32 a resolution of 0.004, which shows where a token sees nothing else: -200 does as well.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peers import peer

reformer = peer("reformer_pytorch.reformer_pytorch")

from attn_zoo import make_attention
from attn_zoo.attention.lsh import bucket_factors
from peers.agreement import agree, normal, torch

B, T, N, H, R, M = 2, 48, 2, 8, 3, 8
(BUCKETS,) = bucket_factors(T, M)


@pytest.mark.parametrize("across", [True, False], ids=["across_buckets", "within_buckets"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_rounds_of_hashing(causal, across, monkeypatch):
    valid_BT = np.arange(T) < np.array([[T - M], [25]])
    valid_BT[1, 9] = False
    rotations_RNHC = jax.random.normal(jax.random.key(0), (R, N, H, BUCKETS // 2))
    by_head = torch.tensor(np.tile(np.transpose(rotations_RNHC, (1, 2, 0, 3)), (B, 1, 1, 1)))
    module = reformer.LSHAttention(
        bucket_size=M, n_hashes=R, causal=causal, allow_duplicate_attention=False, attend_across_buckets=across, random_rotations_per_head=True
    )
    hash_vectors = module.hash_vectors
    rows_valid = torch.tensor(valid_BT).repeat_interleave(N, dim=0)

    def hash_with_a_bucket_for_padding(num_buckets, vectors, **_):
        buckets = hash_vectors(2 * num_buckets, vectors, set_cache=False).reshape(B * N, R, T) % BUCKETS
        buckets = torch.where(rows_valid[:, None], buckets, BUCKETS)
        return (buckets + (BUCKETS + 1) * torch.arange(R)[:, None]).reshape(B * N, R * T)

    def drawn(shape, **_):
        assert shape == by_head.shape
        return by_head

    monkeypatch.setattr(module, "hash_vectors", hash_with_a_bucket_for_padding)
    monkeypatch.setattr(torch, "randn", drawn)
    monkeypatch.setattr(reformer, "TOKEN_SELF_ATTN_VALUE", -200.0)

    def theirs(qk, v):
        rows = lambda x: x.transpose(1, 2).reshape(B * N, T, H)
        return module(rows(qk), rows(v), input_mask=rows_valid)[0].reshape(B, N, T, H).transpose(1, 2)

    attention = make_attention(f"lsh(num_hashes={R}, bucket_size={M}, across_buckets={across})", num_heads=N, head_dim=H, max_len=T, causal=causal)
    ours = lambda qk, v: attention(qk * H**-0.5, qk, v, valid_BS=jnp.asarray(valid_BT))
    agree(ours, theirs, normal(B, T, N, H), normal(B, T, N, H, seed=1), rows_BT=valid_BT)
