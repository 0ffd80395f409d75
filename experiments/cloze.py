"""Which identifier was taken out of a sentence of documentation? Readers that point at it in the text around, beside guesses by how often each stands there.

    python launch.py --config=experiments/cloze.py

Attention-over-attention (Cui et al. 2017), its ancestor the attention sum (Kadlec et al. 2016), and no attention to the text at all. Nothing is timed; a cell takes one to five minutes of a CPU core.

Results (experiments/results/cloze): 36.9 ± 1.0 % by attention over attention, above the best guess by counts (30.6 %: the most frequent candidate that the query does not have); by the
attention sum 27.2 ± 0.6 %, between that and counts alone (24.5 %); without attention 19 ± 3 %.
"""

from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="cloze",
    task="cloze",
    variants=("none", "attention_sum", "attention_over_attention"),
    seq_lens=(48,),  # of the query; the document has up to 256 words
    seeds=(0, 1, 2),
    model=Model(body="reader", D=128, layers=1, dropout=0.2),
    train=Train(steps=900, tokens_per_step=32 * 48, lr=4e-3, warmup=50, clip=5.0, log_every=20, eval_tokens=96_000),
    measure=Measure(modes=()),
)
