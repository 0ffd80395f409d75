"""What PyTorch and the packages of others have, each as the variant of this package that sees the same pairs; torch_worker.py calls them.

A peer gets its inputs in the layout that it asks for, so that no copy of ours is timed. Those that come only with their projections (`layer`: True, or 'inputs' where
there are those to queries, keys and values, and none of the output) get [B, T, N H], and gradients to input and parameters are taken.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench.candidates import way
from bench.single_pattern import claimed_pattern

from attn_zoo import make_attention
from attn_zoo.ops.block_mask import block_mask
from attn_zoo.ops.pallas_kernels import replace_tables
from attn_zoo.ops.patterns import BlockTable, Pattern, table_rows


@dataclasses.dataclass(frozen=True)
class Shape:
    """What all calls of one length share."""

    B: int
    T: int
    N: int
    H: int
    dtype: torch.dtype
    device: str


@dataclasses.dataclass(frozen=True)
class Peer:
    """One row: `build(shape)` gives a function or module of q, k, v [B, N, T, H] (`layout` 'heads first') or [B, T, N, H], or of x [B, T, N H] if it is a layer."""

    name: str
    spec: str
    causal: bool
    build: Callable[[Shape], Callable]
    layer: bool | str = False
    layout: str = "heads first"
    needs: tuple[str, ...] = ()
    cuda: bool = False
    cpu_backward: bool = True
    tunes: bool = False  # when first called it tries out kernels by the clock

    def reason(self, platform: str = "cpu") -> str | None:
        """Why it cannot run beside JAX on this platform, if it cannot."""
        for name in self.needs:
            try:
                importlib.import_module(name)
            except Exception as e:  # fla asks for the device then, and says what it likes if it has none
                return f"{name} cannot be imported: {e}"
        if platform == "gpu" and not torch.cuda.is_available():
            return f"PyTorch {torch.__version__} sees no GPU, though JAX does"
        if platform == "cpu" and torch.cuda.is_available():
            return "PyTorch sees a GPU, and JAX runs on the CPU"
        return "it needs an NVIDIA GPU" if self.cuda and not torch.cuda.is_available() else None


def peers(settings: dict[str, Any]) -> list[Peer]:
    """All of them; flex_attention once for every spec of `settings` that is a single pattern, in its direction."""
    window, block, features, rank, landmarks = (settings[key] for key in ("window", "block", "features", "rank", "landmarks"))
    found = [Peer(f"sdpa{way(causal)}", "full", causal, functools.partial(_sdpa, causal, None)) for causal in (True, False)]
    for kernel in ("cudnn", "flash") if torch.cuda.is_available() else ():  # the one that PyTorch takes by itself may not be its fastest
        found += [Peer(f"sdpa ({kernel}){way(causal)}", "full", causal, functools.partial(_sdpa, causal, kernel)) for causal in (True, False)]
    for spec, causal in settings["patterns"]:
        found.append(Peer(f"flex_attention: {spec}{way(causal)}", spec, causal, functools.partial(_flex, spec, causal), cpu_backward=False))
    fla = dict(causal=True, layout="heads last", needs=("fla",), cuda=True, tunes=True)
    found += [  # those first that try out the fewest kernels
        Peer("flash-linear-attention: delta, without a feature map", "delta(feature_map='elu')", build=functools.partial(_fla, "delta_rule", "chunk_delta_rule"), **fla),
        Peer("flash-linear-attention: retention, without norms", "retention", build=functools.partial(_fla, "retention", "chunk_retention"), **fla),
        Peer("flash-linear-attention: linear, without a feature map", "linear", build=functools.partial(_fla, "linear_attn", "chunk_linear_attn"), **fla),
    ]
    if torch.cuda.is_available():  # the packages below are made of PyTorch's plain operations; the GPU's marks are those above
        return found
    local, bigbird = f"local(window={window})", f"block(block={block}, global_blocks=2, random_blocks=3)"
    linformer, nystrom = f"linformer(rank={rank}, share='heads')", f"nystrom(landmarks={landmarks}, residual_kernel=33)"
    found += [
        Peer("local-attention", local, True, functools.partial(_local_attention, window), needs=("local_attention",)),
        Peer("Longformer (transformers)", local, False, functools.partial(_longformer, window), layer="inputs", needs=("transformers",)),
        Peer("BigBird (transformers)", bigbird, False, functools.partial(_bigbird, block, True), layer="inputs", needs=("transformers",)),
        Peer("BigBird (transformers), between its projections", bigbird, False, functools.partial(_bigbird, block, False), needs=("transformers",)),
        Peer("linformer (PyTorch)", linformer, False, functools.partial(_linformer, rank, True), layer=True, needs=("linformer",)),
        Peer("linformer (PyTorch), between its projections", linformer, False, functools.partial(_linformer, rank, False), layout="heads last", needs=("linformer",)),
        Peer("nystrom-attention", nystrom, False, functools.partial(_nystrom, landmarks, True), layer=True, needs=("nystrom_attention",)),
        Peer("nystrom-attention, between its projections", nystrom, False, functools.partial(_nystrom, landmarks, False), layout="heads last", needs=("nystrom_attention",)),
        Peer("reformer-pytorch", f"lsh(num_hashes=4, bucket_size={block})", True, functools.partial(_reformer, block), layout="shared", needs=("reformer_pytorch",)),
    ]
    for causal in (True, False):
        spec = f"performer(features={features})"
        found.append(Peer(f"performer-pytorch{way(causal)}", spec, causal, functools.partial(_performer, features, causal), needs=("performer_pytorch",)))
    return found


def _sdpa(causal, kernel, shape):
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=causal)
    if kernel is None:
        return attend
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend_by_it(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, f"{kernel.upper()}_ATTENTION")):
            return attend(q, k, v)

    return attend_by_it


def _flex(spec, causal, shape):
    from torch.nn.attention.flex_attention import flex_attention

    attention = make_attention(spec, num_heads=shape.N, head_dim=shape.H, max_len=shape.T, causal=causal)
    # A compilation for each pattern, mode and length: past Dynamo's limit it would run unfused, some sixty times slower, and say nothing.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    mask = flex_mask(claimed_pattern(attention, shape.T), shape.T, shape.device)
    return functools.partial(torch.compile(flex_attention, dynamic=False, fullgraph=True), block_mask=mask)


def flex_mask(pattern: Pattern, T: int, device: str):
    """The BlockMask that flex_attention's create_block_mask makes of a pattern, in a moment in place of a compilation: its lists are this package's."""
    from torch.nn.attention.flex_attention import _DEFAULT_SPARSE_BLOCK_SIZE, BlockMask

    size = _DEFAULT_SPARSE_BLOCK_SIZE
    mask = block_mask(pattern, T, T, size, size)

    def dense(start, block):
        seen = np.zeros((mask.num_q, mask.num_k), bool)
        seen[np.repeat(np.arange(mask.num_q), np.diff(start)), block] = True
        return seen

    part, full = dense(mask.part_start, mask.part_block), dense(mask.full_start, mask.full_block)
    if T % size:  # a block that T cuts is never full there
        part[-1], full[-1] = part[-1] | full[-1], False
    lists = [x.astype(np.int32) for seen in (part, full) for x in (seen.sum(axis=1), np.argsort(~seen, axis=1, kind="stable"))]  # of each row how many, and which first
    lists = (torch.from_numpy(x).to(device)[None, None] for x in lists)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=size, mask_mod=mask_mod_of(pattern, device), seq_lengths=(T, T))


def mask_mod_of(pattern: Pattern, device: str) -> Callable:
    """The pattern as flex_attention takes it: a function of batch, head, query and key, in PyTorch's arithmetic."""
    ours = replace_tables(pattern, lambda table: _TorchTable(table, device))
    return lambda b, n, i, j: ours.mask(i, j)


class _TorchTable(Pattern):
    """A BlockTable looked up in a table of whole blocks on the device."""

    def __init__(self, table: BlockTable, device: str):
        rows = table_rows(table)
        seen = torch.zeros(len(rows), max(len(rows), int(rows.max(initial=0)) + 1), dtype=torch.bool)
        for I, row in enumerate(rows):
            seen[I, [J for J in row.tolist() if J >= 0]] = True
        self.__dict__.update(block=table.block, seen=seen.to(device))

    def mask(self, i, j):
        return self.seen[i // self.block, j // self.block]


def _local_attention(window, shape):
    from local_attention import LocalAttention

    return LocalAttention(window, causal=True, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False)


def _longformer(window, shape):
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    D = shape.N * shape.H
    config = LongformerConfig(hidden_size=D, num_attention_heads=shape.N, attention_window=[2 * window], attention_probs_dropout_prob=0.0, num_hidden_layers=1)
    nobody = torch.zeros(shape.B, shape.T, dtype=torch.bool, device=shape.device)
    mask = torch.zeros(shape.B, shape.T, dtype=shape.dtype, device=shape.device)
    layer = LongformerSelfAttention(config, layer_id=0).to(shape.device, shape.dtype)
    return _Module(layer, lambda x: layer(x, mask, nobody, nobody, False)[0])


def _bigbird(block, projections, shape):
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=shape.N * shape.H, num_attention_heads=shape.N, block_size=block, num_random_blocks=3, max_position_embeddings=shape.T, attention_probs_dropout_prob=0.0
    )
    layer = BigBirdBlockSparseAttention(config, seed=0).train().to(shape.device, shape.dtype)  # in evaluation its random blocks are all the first
    everything = torch.ones(shape.B, shape.T, dtype=shape.dtype, device=shape.device)
    blocked, band, rows, keys = BigBirdModel.create_masks_for_block_sparse_attn(everything, block)
    masks = dict(band_mask=band, from_mask=rows, to_mask=keys, from_blocked_mask=blocked, to_blocked_mask=blocked)
    if projections:
        return _Module(layer, lambda x: layer(x, **masks)[0])
    sizes = shape.N, 3, shape.H, block, block, shape.B, shape.T, shape.T
    return lambda q, k, v: layer.bigbird_block_sparse_attention(q, k, v, *masks.values(), *sizes, seed=0, plan_from_length=None, plan_num_rand_blocks=None)[0].transpose(1, 2)


def _linformer(rank, projections, shape):
    from linformer.linformer import LinformerSelfAttention

    layer = LinformerSelfAttention(shape.N * shape.H, shape.T, k=rank, heads=shape.N, dim_head=shape.H).to(shape.device, shape.dtype)
    if projections:
        return layer
    layer.to_q, layer.to_k, layer.to_v, layer.to_out = _Given(), _Given(), _Given(), torch.nn.Identity()

    def attend(q, k, v):
        layer.to_q.result, layer.to_k.result, layer.to_v.result = (x.flatten(2) for x in (q, k, v))
        return layer(layer.to_q.result).reshape(q.shape)

    return attend


def _nystrom(landmarks, projections, shape):
    from nystrom_attention import NystromAttention

    layer = NystromAttention(shape.N * shape.H, shape.H, shape.N, num_landmarks=landmarks, residual=True, residual_conv_kernel=33).to(shape.device, shape.dtype)
    if projections:
        return layer
    if shape.T % landmarks:
        raise NotImplementedError(f"it pads its input to a multiple of {landmarks} landmarks, and here that is projected already")
    layer.to_qkv, layer.to_out = _Given(), torch.nn.Identity()

    def attend(q, k, v):
        layer.to_qkv.result = _Parts(x.flatten(2) for x in (q, k, v))
        return layer(q.flatten(2)).reshape(q.shape)

    return attend


def _reformer(bucket, shape):
    from reformer_pytorch.reformer_pytorch import LSHAttention

    layer = LSHAttention(bucket_size=bucket, n_hashes=4, causal=True, random_rotations_per_head=True)
    rows = lambda x: x.reshape(-1, *x.shape[2:])
    return _Module(layer, lambda qk, v: layer(rows(qk), rows(v))[0].reshape(v.shape))


def _performer(features, causal, shape):
    from performer_pytorch.performer_pytorch import FastAttention

    return FastAttention(shape.H, features, causal=causal)


def _fla(module, name, shape):
    run = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    if name == "chunk_delta_rule":
        beta = torch.full((shape.B, shape.T, shape.N), 0.5, dtype=shape.dtype, device=shape.device)
        return lambda q, k, v: run(q, k, v, beta, use_qk_l2norm_in_kernel=True)[0]
    return lambda q, k, v: run(q, k, v)[0]


class _Given(torch.nn.Module):
    """Stands for a projection whose result is there already."""

    def forward(self, x):
        return self.result


class _Parts(tuple):
    """Stands for a tensor that is only asked for its parts."""

    def chunk(self, count, dim):
        return self


class _Module:
    """A module called in another way than by itself; its parameters get gradients too."""

    def __init__(self, module: torch.nn.Module, call: Callable):
        self.module, self.call = module, call

    def parameters(self):
        return self.module.parameters()

    def to(self, *args):
        self.module.to(*args)
        return self

    def __call__(self, *args):
        return self.call(*args)
