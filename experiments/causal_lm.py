"""Causal language modelling of bytes: every variant that can be causal, at four lengths, three seeds.

    python launch.py --config=experiments/causal_lm.py

Linformer's rows say why it cannot. On two CPU cores this takes about half a day; on a GPU, minutes a cell.
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
