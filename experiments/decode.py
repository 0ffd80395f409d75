"""Generation at a context of T, one sequence at a time: tokens per second with the state that each variant keeps, and its bytes.

    python launch.py --config=experiments/decode.py

Beside it the rate of feeding the whole sequence again for every token. Nothing is trained. Some twenty minutes on two CPU cores.
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="decode",
    task="bytes",
    variants=(
        "full",
        "local(window=128)",
        "strided",
        "block",
        "fixed",
        "bigbird(window=64, random=16)",
        "tree",
        "lsh",
        "topk",
        "linear",
        "performer",
        "rfa",
        "delta",
        "retention",
        "luna",
        "poolingformer(window=64, second=256)",
        "adaptive_span(max_span=1024, init=96)",
        "mix(local(window=128), full)",
    ),
    seq_lens=(512, 1024, 2048, 4096),
    model=Model(D=256, layers=2, N=4, positions="rotary"),
    train=Train(steps=0, tokens_per_step=512, eval_tokens=4096),
    measure=Measure(modes=("forward", "decode")),
)
