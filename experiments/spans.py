"""How far back does a head learn to look? Adaptive spans in causal language modelling of bytes, by the weight of their penalty, beside full attention.

    python launch.py --config=experiments/spans.py
    python launch.py --plot_attention=results/spans

The spans of all heads are in the records' `statistics`; the second command draws them, by layer, into attention/spans. Nothing is timed; three to five minutes a cell on two CPU cores.

Results (experiments/results/spans, docs/spans.png; one seed): with the paper's penalty of 2e-6 spans stay between 0 and 74 positions, with 2e-4 nearly all go to 0, which leaves the ramp,
the last 31 positions. In these steps the loss does not suffer: 2.10, 2.10 and 2.09 bits per byte, and 2.15 with full attention.
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="spans",
    task="bytes(objective='causal')",
    variants=("full", *(f"adaptive_span(max_span=512, init=64, penalty={penalty})" for penalty in (2e-6, 2e-5, 2e-4))),
    seq_lens=(512,),
    seeds=(0,),
    model=Model(D=96, layers=3, N=4, norm="rmsnorm", ffn="swiglu", positions="rotary"),
    train=Train(steps=1000, tokens_per_step=4 * 512, lr=2e-3, warmup=100, log_every=20),
    measure=Measure(modes=()),
    keep_parameters=True,  # for --plot_attention
)
