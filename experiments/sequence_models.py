"""The Transformer beside what it replaced, on one task in one table: one to three dates at a time, from 8 to over a hundred characters.

    python launch.py --config=experiments/sequence_models.py

Self-attention, full and restricted to a window (in the encoder and in the decoder; cross-attention between them is full); recurrent networks, with one fixed
vector in between (Cho et al. 2014) and with an alignment (Bahdanau et al. 2015); and convolutions, with an encoder that the decoder stands on (Kalchbrenner et
al. 2016; seven layers, whose taps reach 127 characters to both sides). All have about half a million parameters, see the same batches and are trained alike; what
a row has of its own is in its name. Three to ten minutes a cell on two CPU cores.

Results (experiments/results/sequence_models): the recurrent network with an alignment is at 100 % exact match at every length; the Transformer is not done
after these steps, at 79 ± 10 % with full self-attention and 85 ± 3 % with a window; `none` and the convolutions are at 15 ± 5 and 11 ± 5 %, nearly all of it in
sources of up to 31 characters. A step of `recurrent(none)` is 2.4 times as fast as one of `full`; at these lengths a window of 8 makes it slower.
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="sequence_models",
    task="dates(dates=(1, 3))",
    variants=("full", "local(window=8)", "recurrent(none, D=160, layers=1)", "recurrent(additive, D=160, layers=1)", "convolutional(dilated, D=72, layers=7)"),
    seq_lens=(33,),  # of the target; a source has up to 123 characters
    seeds=(0, 1, 2),
    model=Model(D=96, layers=2, N=4, positions="sinusoidal", dropout=0.1),
    train=Train(steps=1000, tokens_per_step=64 * 33, lr=2e-3, warmup=100, weight_decay=0.01, eval_tokens=16_500),
    measure=Measure(modes=("train_step",)),
)
