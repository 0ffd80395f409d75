"""The base model of "Attention is all you need" (Vaswani et al. 2017, table 3) on its own task, English to German.

    python launch.py --config=experiments/translate.py --allow_download                       # downloads the set; meant for GPUs
    python launch.py --config=experiments/translate.py --workdir=results/translate_linformer --variants='linformer' --set model.where=encoder

The paper's 37,000 shared pieces, some 25,000 target tokens a step, 100,000 steps, and its learning rate: D^-1/2 min(step^-1/2, step warmup^-3/2), whose greatest value
is D^-1/2 warmup^-1/2 = 7e-4. Departures: embeddings start at N(0, 0.02^2), Adam's epsilon is 1e-8, dense layers have no biases; a batch is a number of
pairs, padded to T, and longer pairs are left out.
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="translate",
    task="translate(dataset='wmt14_translate/de-en', source='en', target='de', vocab=37000)",
    variants=("full",),
    seq_lens=(128,),
    model=Model(D=512, layers=6, N=8, F=2048, ffn="relu", norm_position="post", positions="sinusoidal", dropout=0.1, share_embeddings=True),
    train=Train(
        steps=100_000,
        tokens_per_step=192 * 128,  # pairs that 2, 4 or 8 devices share
        lr=(512 * 4000) ** -0.5,
        warmup=4000,
        schedule="inverse_sqrt",
        label_smoothing=0.1,
        weight_decay=0.0,
        clip=1e9,
        b2=0.98,
        checkpoint_every=5000,
    ),
    measure=Measure(modes=("train_step",)),
    timeout_s=7 * 86_400,
)
