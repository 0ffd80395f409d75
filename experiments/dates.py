"""The small Transformer, encoder and decoder, on dates: 'samedi 21 novembre 2026' to '2026-11-21', a character at a time.

    python launch.py --config=experiments/dates.py
    python launch.py --config=experiments/dates.py --workdir=results/dates_cross --variants='local(window=8), linear' --set model.where=cross

The small one beside the base model of experiments/translate.py: sinusoidal positions, dropout, label smoothing and inverse-square-root decay as in Vaswani et al.
2017. 99.7 % exact match in six minutes on two CPU cores (experiments/results/dates).
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="dates",
    task="dates",
    variants=("full",),
    seq_lens=(12,),  # of the target; a source has up to 39 characters
    model=Model(D=96, layers=2, N=4, positions="sinusoidal", dropout=0.1),
    train=Train(steps=2000, tokens_per_step=64 * 12, lr=2e-3, warmup=400, schedule="inverse_sqrt", label_smoothing=0.1, eval_tokens=12_000),
    measure=Measure(modes=("train_step",)),
    keep_parameters=True,  # for --plot_attention
)
