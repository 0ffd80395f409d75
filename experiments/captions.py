"""Captions of pictures as in "Show, Attend and Tell" (Xu et al. 2015): a recurrent decoder that looks at a grid of convolutional features, softly or at one place.

    python launch.py --config=experiments/captions.py
    python launch.py --config=experiments/captions.py --workdir=results/captions_transformer --set model.body=transformer --variants='full, hard'

By the second command a Transformer writes the captions, and the variant stands in its cross-attention to the picture (model.where). Beside the share of captions
without a mistake, the records' `written` says how often number, size, colour, form and relation are right in what the model writes, and of hard attention
`estimator` how noisy its gradient is with the moving baseline and without. Some ten minutes a cell on two CPU cores.

Results (experiments/results/captions): 23 ± 22 % without a mistake by soft attention, 12 ± 5 % by hard attention with a score-function term of weight 0.1 and 6 ± 6 % with 1, 8 ± 2 % without
attention. What tells them apart are forms and relations; number, size and colour come with the one vector, too. Other alignments go on in the same table:

    python launch.py --config=experiments/captions.py --variants="dot, hard(estimator='straight_through')"
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="captions",
    task="shapes",
    variants=("none", "additive", "hard", "hard(score_weight=0.1)"),
    seq_lens=(19,),  # the longest caption and its end
    seeds=(0, 1, 2),
    model=Model(body="recurrent", D=96, layers=1, N=4, where=("cross",)),
    train=Train(steps=1000, tokens_per_step=64 * 19, lr=2e-3, warmup=100, log_every=20, eval_tokens=1000 * 19),
    measure=Measure(modes=()),
    timeout_s=1800,
    keep_parameters=True,  # for --plot_attention
)
