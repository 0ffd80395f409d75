"""Attention inside a convolutional network, on whether two shapes far apart have the same colour: each variant, and the network without it.

    python launch.py --config=experiments/pictures.py
    python launch.py --config=experiments/pictures.py --seq_lens=64,256       # attention after the third stage, or the second

T is the number of cells of the grid that attention sees: 16 x 16 of a picture of 32 x 32. `local` sees neighbours in the row, `axial` row and column.
What the layer's gate, which starts at 0, has become is in the records' `statistics`. Two of the three floors know no more than chance; who counts colours and
not shapes gets three quarters right.
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="pictures",
    task="shapes(objective='same')",
    variants=("none", "full", "local(window=8)", "axial(width=16)", "linear", "performer(features=32)"),
    seq_lens=(256,),
    seeds=(0, 1, 2),
    model=Model(body="convnet", D=32, layers=3, N=1),
    train=Train(steps=1500, tokens_per_step=64 * 256, lr=3e-3, warmup=50, log_every=20, eval_tokens=1000 * 256),
    measure=Measure(modes=()),
    timeout_s=900,
)
