"""PyTorch's side of core_bench.py, in a process of its own: the calls of torch_peers.py, each on request.

Requests and answers are JSON, a line each, on standard input and output:
    {"do": "list", settings} -> [{"name", "spec", "causal", "layer", "tunes", "reason"}]      spec: the variant of this package that sees the same pairs
    {"do": "open", "B", "T"} -> {}                                                   what comes next is of this batch and length
    {"do": "prepare", "name", "mode"} -> {"seconds"} or {"reason", "status"}         builds and calls once: what it compiles is in there
    {"do": "time", "name", "mode", "calls"} -> {"seconds"} or {"reason", "status"}   of one call, the mean of so many
    {"do": "about"} -> {"torch", "device"}                                           its version, and where it runs
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # patterns are asked here, nothing is computed; the GPU belongs to the process that times JAX, and to PyTorch

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it is no part of a package
from bench.candidates import said, status_of
from bench.torch_peers import Peer, Shape, peers

from attn_zoo.memory import keep_freed_memory


class Worker:
    """The state between requests: the peers, the inputs of one length, and what was built for them."""

    def __init__(self):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.peers: dict[str, Peer] = {}
        self.built: dict[str, Callable] = {}
        self.arguments: dict[tuple, torch.Tensor] = {}

    def list(self, **settings) -> list[dict]:
        """Every peer, and why it cannot run if it cannot."""
        self.settings = settings
        if settings.get("memory_kept") and not keep_freed_memory():
            raise RuntimeError("the process of JAX keeps freed memory, and this one cannot; use --nokeep_memory")
        self.peers = {peer.name: peer for peer in peers(settings)}
        platform = settings.get("platform", "cpu")
        return [{"name": p.name, "spec": p.spec, "causal": p.causal, "layer": p.layer, "tunes": p.tunes, "reason": p.reason(platform)} for p in self.peers.values()]

    def about(self) -> dict:
        """What PyTorch this is, and where it runs."""
        return {"torch": torch.__version__, "device": torch.cuda.get_device_name() if self.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"}

    def open(self, B: int, T: int) -> dict:
        """Frees what was built, and what comes next is of this batch and length."""
        s = self.settings
        self.built.clear()
        self.arguments.clear()
        torch._dynamo.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        torch.manual_seed(0)
        self.shape = Shape(B, T, s["N"], s["H"], getattr(torch, s["dtype"]), self.device)
        return {}

    def prepare(self, name: str, mode: str) -> dict:
        """Builds and calls it once; the seconds of that."""
        start = time.perf_counter()
        try:
            call = self.call_of(self.peers[name], mode)
            call()
            self.synchronize()
        except Exception as e:  # a row with the reason, whatever it is
            self.synchronize()  # which ends this process if nothing runs any more on the GPU
            return {"reason": said(e), "status": status_of(e)}
        self.built[name, mode] = call
        return {"seconds": time.perf_counter() - start}

    def time(self, name: str, mode: str, calls: int) -> dict:
        """Seconds of one call, or the reason why it failed."""
        call = self.built[name, mode]
        try:
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            self.synchronize()
        except Exception as e:
            self.synchronize()
            return {"reason": said(e), "status": status_of(e)}
        return {"seconds": (time.perf_counter() - start) / calls}

    def call_of(self, peer: Peer, mode: str) -> Callable[[], Any]:
        """A call without arguments of what is timed."""
        shape, backward = self.shape, mode == "forward_backward"
        if backward and not peer.cpu_backward and self.device == "cpu":  # not tried: after a failed compilation its forward pass would run unfused too
            raise NotImplementedError("it has no backward pass on the CPU")
        function = peer.build(shape)
        if hasattr(function, "to"):
            function = function.to(shape.device, shape.dtype)
        parameters = [p for p in getattr(function, "parameters", tuple)() if p.requires_grad]
        if not backward:
            for p in parameters:
                p.requires_grad_(False)
        sizes = {"heads first": (shape.B, shape.N, shape.T, shape.H), "heads last": (shape.B, shape.T, shape.N, shape.H)}
        size = (shape.B, shape.T, shape.N * shape.H) if peer.layer else sizes.get(peer.layout, sizes["heads first"])
        count = 1 if peer.layer else 2 if peer.layout == "shared" else 3
        inputs = [self.given(size, n, backward) for n in range(count)]
        if not backward:

            def forward():
                with torch.no_grad():
                    return function(*inputs)

            return forward
        do = self.given(size, count, False)

        def both():
            return torch.autograd.grad(function(*inputs), [*inputs, *parameters], do, allow_unused=True)

        return both

    def given(self, size: tuple[int, ...], n: int, backward: bool) -> torch.Tensor:
        """The n-th random argument of this size: that of all rows, for which there may not be memory each."""
        key = size, n, backward
        if key not in self.arguments:
            self.arguments[key] = torch.randn(size, device=self.shape.device).to(self.shape.dtype).requires_grad_(backward)
        return self.arguments[key]

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what packages print is no answer
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(worker, request.pop("do"))(**request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
