"""The default sweep: the seven first variants on masked bytes, T = 256 to 2048, at a constant number of tokens a step.

    make sweep

Sized for two CPU cores: a small encoder and few steps. The speeds are what it is for; experiments/seq_len_gpu.py has more of both, for a GPU.

Results (experiments/results/seq_len, one seed): in loss every cell passes the byte frequencies (unigram floor, 4.62 bits), but `linear`, `linformer` and, at two
of four lengths, `full` by little (4.51 to 4.60); the other variants end at 3.99 to 4.21. In accuracy most cells are below that floor. Which learns best is not told.
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="seq_len",
    task="bytes(objective='masked', mask_rate=0.3)",
    variants=("full", "local(window=64)", "strided", "block(block=32)", "linear", "linformer(rank=64)", "adaptive_span(max_span=128, init=48)"),
    seq_lens=(256, 512, 1024, 2048),
    model=Model(D=64, layers=2, N=4, positions="rotary"),
    train=Train(steps=200, tokens_per_step=2048, lr=4e-3, warmup=30, log_every=10, eval_tokens=32768),
    measure=Measure(min_seconds=1.0),
    timeout_s=600,
)
