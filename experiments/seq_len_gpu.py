"""The default sweep at the size of a GPU: its seven variants on masked bytes at T = 1k to 32k, a 6-layer encoder of width 512 in bfloat16, three seeds.

    make venv ACCELERATOR=cuda13
    .venv/bin/python launch.py --config=experiments/seq_len_gpu.py

For one data-centre GPU. A step has 65,536 tokens at every length. Evaluation segments are as long as the longest T, so that all lengths
are scored on the same bytes.
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="seq_len_gpu",
    task="bytes(objective='masked', eval_segment=32768)",
    variants=("full", "local(window=256)", "strided", "block(block=64)", "linear", "linformer(rank=256)", "adaptive_span(max_span=1024, init=128)"),
    seq_lens=(1024, 2048, 4096, 8192, 16384, 32768),
    seeds=(0, 1, 2),
    model=Model(D=512, layers=6, N=8, positions="rotary", dtype="bfloat16"),
    train=Train(steps=1000, tokens_per_step=65536, lr=1e-3, warmup=100, checkpoint_every=250, eval_tokens=262144),
    measure=Measure(warmup=5, min_steps=20, min_seconds=2.0),
    timeout_s=3600,
)
