"""What each variant learns: associative recall for every one that can be causal, short ListOps for every one without a causal mask.

    python experiments/recall.py               # both tables, into results/recall_mqar and results/recall_listops
    python experiments/recall.py --only=mqar

mqar asks for the value that stood beside a key some 10 to 60 positions back: what sees or carries no more than its neighbourhood fails it.
listops asks for the value of a nested expression of 17 to 63 tokens. Options are scaled to T = 64, so that what is sparse is sparse there too. The seven variants of the
default sweep run with three seeds, the others with one. Nothing is timed, so both tables may be made at once. The committed ones were, on two CPU cores;
their cells add up to 79 minutes (mqar) and 77 (listops).

Recall comes suddenly: at 25 %, which is to know the sequence's values and not whose they are, a variant may be one that cannot, or one that has not yet.
"""

import argparse
import dataclasses
from pathlib import Path

from attn_zoo import sweep
from attn_zoo.attention import find
from attn_zoo.config import Experiment, Measure, Model, Train
from attn_zoo.progress import Display
from attn_zoo.report import write_report

SEVEN = ("full", "local(window=8)", "strided(stride=8)", "block(block=8, random_blocks=1)", "linear", "linformer(rank=16)", "adaptive_span(max_span=64, init=16, ramp=8)")
OTHERS = (
    "additive",
    "hard",
    "luong_local(window=8)",
    "persistent(slots=16)",
    "attention_over_attention",
    "block_local(block=16)",
    "dilated(window=4, dilation=4)",
    "fixed(stride=8, summary=2)",
    "axial(width=8)",
    "global_window(window=8, globals=4)",
    "bigbird(window=4, globals=2, random=6)",
    "star",
    "random(k=12)",
    "tree(neighbours=2)",
    "lsh(bucket_size=16)",
    "routing(clusters=4)",
    "sinkhorn(block=16)",
    "topk(k=8)",
    "linear(feature_map='relu')",
    "linear(feature_map='dpfp')",
    "linear(feature_map='cosformer')",
    "performer(features=64)",
    "rfa",
    "delta",
    "retention",
    "clustered(clusters=16, topk=8)",
    "informer(factor=3)",
    "linformer(rank=16, projection='conv')",
    "linformer(rank=16, projection='pool')",
    "memory_compressed",
    "set(inducing=16)",
    "luna",
    "poolingformer(window=4, second=24)",
    "nystrom(landmarks=16)",
    "mix(local(window=8), full)",
)

mqar = Experiment(
    name="recall_mqar",
    task="mqar(vocab=32, pairs=4)",
    variants=tuple(spec for spec in (*SEVEN, *OTHERS) if find(spec)[0].causal is True),
    seq_lens=(64,),
    model=Model(D=64, layers=2, N=2, positions="learned"),
    train=Train(steps=800, tokens_per_step=2048, lr=4e-3, warmup=50, log_every=20, eval_tokens=65536),
    measure=Measure(modes=()),
    timeout_s=900,
)
listops = dataclasses.replace(
    mqar,
    name="recall_listops",
    task="listops(form='short', max_length=64)",
    variants=(*SEVEN, *OTHERS),
    train=Train(steps=600, tokens_per_step=2048, lr=2e-3, warmup=50, log_every=20, eval_tokens=64000),
)
EXPERIMENTS = {"mqar": mqar, "listops": listops}


def main() -> None:
    """Runs what has no record yet and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=EXPERIMENTS)
    parser.add_argument("--results", default="results", help="folder of the workdirs")
    parser.add_argument("--data_dir", default="data", help="where prepared datasets are kept")
    args = parser.parse_args()
    for name in [args.only] if args.only else EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        workdir = str(Path(args.results, experiment.name))
        # The seven last: the report takes the order of its rows from the latest run, then from those before.
        for variants, seeds in ((OTHERS, (0,)), (SEVEN, (0, 1, 2))):
            chosen = tuple(spec for spec in variants if spec in experiment.variants)
            sweep.run(dataclasses.replace(experiment, variants=chosen, seeds=seeds), workdir, args.data_dir, Display())
        print(write_report(workdir))


if __name__ == "__main__":
    main()
