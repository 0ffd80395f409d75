"""What alignment is for: recurrent models on one to three dates at a time, from 8 to over a hundred characters; exact match is told up to 79.

    python launch.py --config=experiments/alignment.py
    python launch.py --config=experiments/alignment.py --workdir=results/alignment_transformer --set model.body=transformer --variants=full

As Bahdanau et al. 2015, fig. 2: without attention (`none`) everything that is said must pass through one vector of fixed size. Exact match by source length is
in the second table and in figures/probes. Nothing is timed; a cell takes two to six minutes of a CPU core.

    python launch.py --config=experiments/alignment.py --workdir=results/alignment_long --set train.steps=1200 --variants='none, local_p, hard(score_weight=0.1)'

Results (experiments/results/alignment): alignments to the whole source stay above 93 % at every length, where `none` falls from 11 % to 0. `local_p`, which predicts
the place it looks around, falls to 70 %. `local_m` looks at the source where the target stands, which is where its date stands in short sources only. `hard`
does not learn where to look in these steps where its score-function term has weight 1; with 0.1, whose gradient is less noisy, it is on its way, at 38 to 77 %.
In twice the steps (experiments/results/alignment_long) `hard(score_weight=0.1)` is at 99 % at every length and `local_p` at 83 to 100 %; `none`, of one seed
there, at 35 % where the source is shortest, and below 1 % from 44 characters on. A cell of these takes up to half an hour.

A longer source is more dates, and its target more digits to get wrong: what alignment does is told by the rows of one length, not by one row along the lengths.
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="alignment",
    task="dates(dates=(1, 3))",
    variants=("none", "additive", "dot", "general", "concat", "local_m", "local_p", "hard", "hard(score_weight=0.1)"),
    seq_lens=(33,),  # of the target; a source has up to 123 characters
    seeds=(0, 1, 2),
    model=Model(body="recurrent", D=96, layers=1),
    train=Train(steps=600, tokens_per_step=64 * 33, lr=3e-3, warmup=100, weight_decay=0.01, eval_tokens=16_500),
    measure=Measure(modes=()),
    keep_parameters=True,  # for --plot_attention
)
