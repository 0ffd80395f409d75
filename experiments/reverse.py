"""The small Transformer on sequences read backwards, at the lengths it was trained on and beyond: exact match by length is in the records' `probes`.

    python launch.py --config=experiments/reverse.py
    python launch.py --config=experiments/reverse.py --workdir=results/sort --set task=sort
    python launch.py --config=experiments/reverse.py --workdir=results/reverse_joined --seq_lens=65 --set "task=reverse(joined=True)"       # a decoder alone

100.0 % exact match at lengths 4 to 16, which it was trained on, and none beyond, in five minutes on two CPU cores (experiments/results/reverse).
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="reverse",
    task="reverse",
    variants=("full",),
    seq_lens=(33,),  # 32 symbols, twice as many as in training, and their end
    model=Model(D=96, layers=2, N=4, positions="sinusoidal"),
    train=Train(steps=2000, tokens_per_step=64 * 33, lr=2e-3, warmup=200, eval_tokens=33_000),
    measure=Measure(modes=("train_step",)),
    keep_parameters=True,  # for --plot_attention
)
