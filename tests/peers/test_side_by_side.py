"""PyTorch's side of experiments/core_bench.py: every peer that this machine can run gives a time, and flex_attention gets the pattern of the variant beside it."""

import sys
from pathlib import Path

import numpy as np
import pytest

from attn_zoo import VARIANTS, make_attention
from attn_zoo.attention.pattern import dense_mask
from peers import peer

torch = peer("torch")
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
from bench import torch_peers
from bench.candidates import TorchProcess
from bench.single_pattern import claimed_pattern, single_pattern

T, N, H = 96, 2, 16
SETTINGS = {"B": 1, "N": N, "H": H, "dtype": "float32", "window": 16, "block": 16, "features": 8, "rank": 8, "landmarks": 8, "patterns": [["local(window=16)", True]]}
SETTINGS["platform"] = "gpu" if torch.cuda.is_available() else "cpu"
DIRECTED = [(name, causal) for name, v in VARIANTS.items() for causal in (True, False) if not causal or v.causal is True]
PATTERNS = {f"{name}-{causal}": pattern for name, causal in DIRECTED if (pattern := single_pattern(make_attention(name, num_heads=N, head_dim=H, max_len=T, causal=causal), T))}


@pytest.mark.parametrize("name", PATTERNS)
def test_flex_attention_sees_the_same_pairs(name):
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    seen = torch_peers.mask_mod_of(PATTERNS[name], "cpu")(0, 0, i, j).expand(T, T)
    np.testing.assert_array_equal(seen.numpy(), np.broadcast_to(dense_mask(PATTERNS[name], T, T)[0, 0], (T, T)))


@pytest.mark.parametrize("T", [96, 1000])
@pytest.mark.parametrize("spec, causal", [(name, causal) for name, causal in DIRECTED if f"{name}-{causal}" in PATTERNS], ids=str)
def test_its_block_mask_is_that_of_create_block_mask(spec, causal, T):
    from torch.nn.attention.flex_attention import create_block_mask

    pattern = claimed_pattern(make_attention(spec, num_heads=N, head_dim=H, max_len=T, causal=causal), T)
    ours = torch_peers.flex_mask(pattern, T, "cpu")
    theirs = create_block_mask(torch_peers.mask_mod_of(pattern, "cpu"), None, None, T, T, device="cpu")
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for way in ("kv", "q"):
        for part in ("", "full_"):
            counts = [getattr(mask, f"{part}{way}_num_blocks") for mask in (ours, theirs)]
            np.testing.assert_array_equal(*counts)
            for row, count in enumerate(counts[0].flatten().tolist()):
                np.testing.assert_array_equal(*(getattr(mask, f"{part}{way}_indices").flatten(0, 2)[row, :count] for mask in (ours, theirs)))


def test_a_kernel_of_sdpa_can_be_asked_for():
    q, k, v = torch.randn(3, 1, N, T, H)
    shape = torch_peers.Shape(1, T, N, H, torch.float32, "cpu")
    np.testing.assert_allclose(torch_peers._sdpa(True, "flash", shape)(q, k, v), torch_peers._sdpa(True, None, shape)(q, k, v), atol=1e-6)


@pytest.fixture(scope="module")
def worker():
    """In a process of its own, as core_bench.py has it: there no test's type checks stand in the way of PyTorch's compiler."""
    process = TorchProcess(sys.executable, SETTINGS)
    process.ask("open", B=1, T=T)
    yield process
    process.close()


CUDA_ALONE = tuple(p.name for p in torch_peers.peers(SETTINGS) if p.cuda)
NAMES = [p.name for p in torch_peers.peers(SETTINGS)]


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("name", NAMES)
def test_a_peer_gives_a_time_or_a_reason(worker, name, mode):
    [reason] = [p["reason"] for p in worker.peers if p["name"] == name]
    if name in CUDA_ALONE and not torch.cuda.is_available():
        assert "cannot be imported" in reason or "needs an NVIDIA GPU" in reason
        return
    assert reason is None
    answer = worker.ask("prepare", name=name, mode=mode)
    if name.startswith("flex_attention") and mode == "forward_backward" and not torch.cuda.is_available():
        assert "no backward pass on the CPU" in answer["reason"]
        return
    assert answer.keys() == {"seconds"}, answer
    assert worker.ask("time", name=name, mode=mode, calls=2)["seconds"] > 0


@pytest.mark.parametrize("name", ["linformer", "nystrom"])
def test_between_its_projections_a_package_does_what_its_layer_does(name):
    build, shape = getattr(torch_peers, f"_{name}"), torch_peers.Shape(2, T, N, H, torch.float32, "cpu")

    def built(projections):
        torch.manual_seed(0)
        return build(8, projections, shape)

    layer, attend, x = built(True).eval(), built(False), torch.randn(2, T, N * H)
    projected = layer.to_qkv(x).chunk(3, dim=-1) if name == "nystrom" else (layer.to_q(x), layer.to_k(x), layer.to_v(x))
    o = attend(*(part.reshape(2, T, N, H) for part in projected))
    np.testing.assert_allclose(layer.to_out(o.flatten(2)).detach(), layer(x).detach(), atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU here")
def test_no_peer_runs_on_the_cpu_beside_a_gpu():
    able = [p for p in torch_peers.peers(SETTINGS) if p.reason() is None]
    assert able and all("sees no GPU" in p.reason("gpu") for p in able)


def test_no_peer_has_the_name_of_a_variant():
    assert not {spec.split("(")[0] for spec in NAMES if "PyTorch" not in spec} & VARIANTS.keys()  # a row is known by its name


def test_it_says_what_it_is(worker):
    assert worker.about["torch"] == torch.__version__ and worker.about["device"]
