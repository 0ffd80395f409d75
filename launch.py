"""Launches sweeps of the attention zoo.

    python launch.py --config=experiments/seq_len.py --workdir=results/longer --variants='full, local(window=128)' --seq_lens=512,1024 --seeds=0,1,2 --set train.steps=500
    python launch.py --config=experiments/causal_lm.py --dry_run
    python launch.py --list
    python launch.py --workdir=results/seq_len --report_only
    python launch.py --plot_attention=results/dates
"""

import contextlib
import dataclasses
import runpy
import signal
import sys
from pathlib import Path

from absl import flags

from attn_zoo.config import Experiment, overlay
from attn_zoo.spec import UserError

CONFIG = flags.DEFINE_string("config", None, "A file in experiments/ that defines `experiment`.")
VARIANTS = flags.DEFINE_string("variants", None, "Attention variants instead of the experiment's, e.g. 'full, local(window=128), [linear, full]', also in models of their own, e.g. 'recurrent(additive, layers=1)'.")
SEQ_LENS = flags.DEFINE_list("seq_lens", None, "Sequence lengths instead of the experiment's.")
SEEDS = flags.DEFINE_list("seeds", None, "Seeds instead of the experiment's.")
SET = flags.DEFINE_multi_string("set", [], "A setting of the experiment, e.g. --set train.steps=500; may be repeated.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where records, tables and figures go; results/<name of the experiment> by default.")
DATA_DIR = flags.DEFINE_string("data_dir", "data", "Where prepared datasets are kept.")
ALLOW_DOWNLOAD = flags.DEFINE_bool("allow_download", False, "Let a task download the data that it needs; without it, the message says what and how much.")
RETRY = flags.DEFINE_bool("retry", False, "Run cells again that ended in error or timeout.")
RETRY_DISTURBED = flags.DEFINE_bool("retry_disturbed", False, "Run cells again that are marked as disturbed: while they ran, so did something else.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the cells with estimated FLOPs and memory, and run nothing.")
LIST = flags.DEFINE_bool("list", False, "Print the zoo: options, complexity, abilities and papers.")
REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Make tables and figures again from the records in --workdir.")
PLOT_ATTENTION = flags.DEFINE_string(
    "plot_attention",
    None,
    "Draw what the trained models of a sweep look at: of this workdir, into its folder attention, of each variant and length the first "
    "seed whose parameters were kept. Or `patterns`: what sees what in the sparse variants of the zoo, into --workdir or docs.",
)


def load_experiment() -> Experiment:
    """The experiment that --config and the overriding flags describe."""
    if CONFIG.value is None:
        defines = lambda path: any(line.startswith("experiment = ") for line in path.read_text(encoding="utf-8").splitlines())
        available = ", ".join(sorted(str(p) for p in Path("experiments").glob("*.py") if defines(p))) or "none here"
        raise UserError(f"--config is needed, a file that defines `experiment`; available: {available}")
    if not Path(CONFIG.value).is_file():
        raise UserError(f"--config={CONFIG.value}: there is no such file")
    try:
        experiment = runpy.run_path(CONFIG.value).get("experiment")
    except UserError as e:
        raise UserError(f"--config={CONFIG.value}: {e}") from None
    except (Exception, SystemExit) as e:  # any mistake in a file that a person wrote
        raise UserError(f"--config={CONFIG.value}: {type(e).__name__}: {' '.join(str(e).split())}") from None
    if not isinstance(experiment, Experiment):
        raise UserError(f"--config={CONFIG.value}: must define `experiment`, an attn_zoo.config.Experiment")
    changes = {}
    if VARIANTS.value is not None:
        changes["variants"] = (VARIANTS.value,)
    for flag in (SEQ_LENS, SEEDS):
        if flag.value is not None:
            changes[flag.name] = tuple(_int(flag.name, x) for x in flag.value)
    return overlay(dataclasses.replace(experiment, **changes), SET.value)


def _int(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--{flag}: {text!r} is not a whole number; write e.g. --{flag}=512,1024") from None


def main(argv: list[str]) -> int:
    """Does what the flags ask for and returns the exit status."""
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; everything is given by flags, as in --config=experiments/seq_len.py")
    if LIST.value:
        from attn_zoo.catalogue import zoo_table

        print(zoo_table())
        return 0
    if REPORT_ONLY.value:
        if WORKDIR.value is None:
            raise UserError("--report_only needs --workdir, e.g. --workdir=results/seq_len")
        return _report(WORKDIR.value)
    if PLOT_ATTENTION.value is not None:
        from attn_zoo.attention_report import write_attention, write_patterns

        drawn = write_patterns(WORKDIR.value or "docs") if PLOT_ATTENTION.value == "patterns" else write_attention(PLOT_ATTENTION.value, DATA_DIR.value)
        print(*drawn, sep="\n")
        return 0
    experiment = load_experiment()
    if DRY_RUN.value:
        from attn_zoo.catalogue import cell_table

        print(cell_table(experiment, DATA_DIR.value))
        return 0
    return _sweep(experiment, WORKDIR.value or str(Path("results", experiment.name)))


def _sweep(experiment: Experiment, workdir: str) -> int:
    from attn_zoo import sweep
    from attn_zoo.progress import Display

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop is a stop, whoever asks
    try:
        again = {"retry": RETRY.value, "retry_disturbed": RETRY_DISTURBED.value}
        records = sweep.run(experiment, workdir, DATA_DIR.value, Display(), allow_download=ALLOW_DOWNLOAD.value, **again)
    except KeyboardInterrupt:
        print(f"\nstopped; what is done is in {workdir}. The same command goes on from there.", file=sys.stderr)
        return 130
    status = _report(workdir)
    failed = [r for r in records if r["status"] in sweep.FAILED]
    if failed:
        print(f"{len(failed)} of {len(records)} cells failed, see {workdir}/logs; --retry runs them again", file=sys.stderr)
    return 1 if failed else status


def _report(workdir: str) -> int:
    from attn_zoo.report import write_report

    print(write_report(workdir))
    print(f"\nTables, figures and cite.bib are in {workdir}")
    return 0


def entry() -> None:
    """Parses flags and runs; bad input ends in one line and exit status 2."""

    def parse(argv):
        if {"-h", "--help", "--helpshort", "--helpfull"} & set(argv):
            print(f"{__doc__}\n{flags.FLAGS.get_help()}")
            sys.exit(0)
        try:
            return flags.FLAGS(argv)
        except flags.Error as e:
            raise UserError(" ".join(str(e).split())) from None

    try:
        with contextlib.suppress(BrokenPipeError):
            sys.exit(main(parse(sys.argv)))
    except UserError as e:
        print(f"launch.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    entry()
