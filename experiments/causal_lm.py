"""Causal language modelling of bytes: the variants of the default sweep and a list that changes from layer to layer, at four lengths, three seeds.

    python launch.py --config=experiments/causal_lm.py

Linformer cannot be causal, and its rows say why. The training of the others is 63 PFLOP (--dry_run): days on two CPU cores, whose matrix product runs at some 0.2 TFLOP/s.
"""

from attn_zoo.config import Experiment, Model, Train

experiment = Experiment(
    name="causal_lm",
    task="bytes(objective='causal')",
    variants=("full", "local(window=128)", "strided", "block(block=64)", "linear", "linformer(rank=64)", "adaptive_span(max_span=1024, init=64)", "[local(window=128), full]"),
    seq_lens=(512, 1024, 2048, 4096),
    seeds=(0, 1, 2),
    model=Model(D=256, layers=4, N=4, norm="rmsnorm", ffn="swiglu", positions="rotary"),
    train=Train(steps=2000, tokens_per_step=16384, lr=2e-3, warmup=100, checkpoint_every=200, eval_every=500),
    timeout_s=4 * 3600,
)
