"""Attention inside a convolutional network, on whether two shapes far apart have the same colour: five variants, and the network without any.

    python launch.py --config=experiments/pictures.py
    python launch.py --config=experiments/pictures.py --set "task=shapes(objective='same', max_shapes=3)" --workdir=results/pictures_of_three

T is the number of cells of the grid that attention sees: 16 x 16 of a picture of 32 x 32, after the second of three stages. `local` sees neighbours in the row, `axial`
row and column. Nothing else carries what a cell saw across the picture. What the layer's gate, which starts at 0, has become is in the records' `statistics`.

The answer comes suddenly, if it comes: at 50 % a variant may be one that cannot, or one that has not yet. Four to six minutes a cell on two CPU cores.

Results (experiments/results/pictures: three of the 18 cells, seed 0 of `none`, `full` and `local`): `full` tells 98.7 %, from some 700 steps on; `local` and the network alone stay at the floor in loss, and below it
in accuracy (41 and 35 %), since what is judged are combinations never trained on.
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="pictures",
    task="shapes(objective='same', max_shapes=2)",
    variants=("none", "full", "local(window=8)", "axial(width=16)", "linear", "performer(features=32)"),
    seq_lens=(256,),
    seeds=(0, 1, 2),
    model=Model(body="convnet", D=32, layers=3, N=4),
    train=Train(steps=2500, tokens_per_step=32 * 256, lr=3e-3, warmup=50, weight_decay=0.01, log_every=20, eval_every=500, eval_tokens=1000 * 256),
    measure=Measure(modes=()),
    timeout_s=1800,
)
