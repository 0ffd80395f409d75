"""The numbers of the tables and figures, from records: seeds pooled, intervals, scaling exponents, crossovers.

Losses, accuracies, times and rates pool the seeds that ended ok. Parameters, compile time, memory and backend are facts of
the compiled step, and stand in a row whenever a cell came far enough to know them.
"""

import dataclasses
import math
import statistics
from typing import Any

from scipy.special import stdtrit

from attn_zoo.spec import UserError

REFERENCE = "full"  # the variant that the others are compared with
FORESEEN = 16  # times the longest length measured, a fit is followed
DECIMALS = 3  # of a loss or an accuracy as a fraction, as printed


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant at one length, its seeds pooled; or a floor of the task (status 'floor'), at one length or at all (None)."""

    variant: str
    seq_len: int | None
    status: str  # of all seeds, or e.g. '2 ok, 1 nan'
    message: str = ""  # of the first seed that did not end ok
    seeds: int = 0
    seeds_ok: int = 0
    params: int | None = None
    params_differ: bool = False  # from the reference at this length, by more than 1 %
    loss: float | None = None  # the headline: bits per byte, or nats
    loss_interval: float | None = None  # half of the 95 % interval over seeds
    accuracy: float | None = None
    accuracy_interval: float | None = None
    exact: float | None = None  # share of examples without any mistake, where a task generates something
    exact_interval: float | None = None
    slots: float | None = None  # share of what is said that is right, where a task has slots and the model writes by itself
    slots_interval: float | None = None
    bleu: float | None = None  # 0 to 100, of translations that the model writes by itself
    bleu_interval: float | None = None
    tokens_per_step: int | None = None
    tokens_per_s: float | None = None
    times_faster: float | None = None  # than the reference at this length: its step time over this one's
    step_s: float | None = None  # train step; the median over seeds of the medians
    step_s_p20: float | None = None  # the least of the seeds, and the most: a spread between processes shows
    step_s_p80: float | None = None
    forward_backward_s: float | None = None
    compile_s: float | None = None  # of the train step, tracing and lowering included
    temp_bytes: float | None = None
    useful_flops_per_s: float | None = None
    matmul_fraction: float | None = None  # of the matrix product rate that each process measured
    decode_tokens_per_s: float | None = None  # generated, at a context of T
    decode_step_s: float | None = None  # a step of the whole batch: median over seeds, least 20th and greatest 80th percentile
    decode_step_s_p20: float | None = None
    decode_step_s_p80: float | None = None
    refeed_tokens_per_s: float | None = None  # if every token took a forward pass over T instead
    state_bytes: float | None = None  # of a decoder at that context, a sequence
    disturbed: bool = False
    backend: str = ""

    @property
    def sequences_per_step(self) -> float:
        return self.tokens_per_step / self.seq_len


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How one variant grows with T over the lengths where it ran, and from which length on it is faster than the reference."""

    variant: str
    lengths: int
    shortest: int
    longest: int
    step_exponent: float | None  # of the train step's time per sequence; None with fewer than three lengths
    step_exponent_se: float | None
    forward_backward_exponent: float | None
    forward_backward_exponent_se: float | None
    memory_exponent: float | None  # of the train step's temporary memory per sequence
    memory_exponent_se: float | None
    crossover: float | None  # 0: faster at every length measured; inf: from none of them on; None: nothing to compare
    crossover_low: float | None
    crossover_high: float | None


@dataclasses.dataclass(frozen=True)
class Probe:
    """One variant at one length on one further split of its task, seeds pooled."""

    variant: str
    seq_len: int
    split: str
    score: float  # see probe_metric
    interval: float | None
    seeds_ok: int


def rows(records: list[dict[str, Any]]) -> list[Row]:
    """The main table: by length, then by variant in the order of the records, then the floors.

    Floors that read the same at every length are one row at the end; else they close the rows of their length.
    Raises UserError when the records are not of one experiment.
    """
    check_one_experiment(records)
    floors_of = lambda T: _floors(records, T) if trained(records) else []
    groups: dict[tuple[int, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["cell"]["seq_len"], record["cell"]["variant"]), []).append(record)
    marked = disturbed(records)
    table, common = [], {}
    floors_differ = len({_as_printed(floors_of(T)) for T in lengths_of(records) if floors_of(T)}) > 1
    for T in lengths_of(records):
        for variant in variants_of(records):
            if (T, variant) in groups:
                table.append(_row(groups[T, variant], groups.get((T, REFERENCE), []), marked))
        if floors_differ:
            table += floors_of(T)
        else:
            common = common or floors_of(T)
    return table + [dataclasses.replace(floor, seq_len=None) for floor in common]


def disturbed(records: list[dict[str, Any]]) -> set[str]:
    """The ids of cells during which something else used the machine: its matrix product rates before and after differ by more than 20 %, or one of them does from
    the median of all that were measured on such a machine."""
    rates = {r["id"]: [v for v in (reached(r, "calibration", "matmul_flops_per_s", when) for when in ("before", "after")) if v] for r in records if r["status"] == "ok"}
    machine = {r["id"]: tuple(reached(r, "provenance", key) for key in ("device_kind", "cpu")) for r in records}
    usual = {m: statistics.median(every) for m in set(machine.values()) if (every := [v for i, own in rates.items() if machine[i] == m for v in own])}
    far = lambda every: max(every) > 1.2 * min(every)
    return {i for i, own in rates.items() if own and far([*own, usual[machine[i]]])}


def scaling(table: list[Row]) -> list[Scaling]:
    """The second table, from the rows of the first. Variants that ran at no length are left out.

    A step holds a constant number of tokens, so what grows with T is the cost of one sequence: that of the step over its batch.
    The exponent is the slope of a least-squares line through log cost against log T, one point a length, with its standard error.
    """
    ran = [row for row in table if row.step_s and row.tokens_per_step]
    reference = {row.seq_len: row for row in ran if row.variant == REFERENCE}
    result = []
    for variant in dict.fromkeys(row.variant for row in ran):
        own = {row.seq_len: row for row in ran if row.variant == variant}
        shared = [] if variant == REFERENCE else [T for T in own if T in reference]
        crossovers = [crossover(shared, *curves) for curves in _curves(shared, reference, own)] if shared else [None] * 3
        exponents = []
        for cost in ("step_s", "forward_backward_s", "temp_bytes"):
            known = [row for row in own.values() if getattr(row, cost)]
            exponents += fit_exponent([row.seq_len for row in known], [getattr(row, cost) / row.sequences_per_step for row in known])
        result.append(Scaling(variant, len(own), min(shared or own), max(shared or own), *exponents, *crossovers))
    return result


def probes(records: list[dict[str, Any]]) -> list[Probe]:
    """The scores on further splits, by length, variant and split, in the order of the records; empty where the task has none, or nothing was trained."""
    metric, groups = probe_metric(records), {}
    for record in records if trained(records) else ():
        for split, scores in (record.get("probes") or {}).items() if record["status"] == "ok" else ():
            groups.setdefault((record["cell"]["seq_len"], record["cell"]["variant"], split), []).append(scores[metric])
    return [Probe(variant, T, split, *mean_interval(values), len(values)) for (T, variant, split), values in groups.items()]


def probe_metric(records: list[dict[str, Any]]) -> str:
    """What a split is scored by: 'eval_exact' where the task generates something, else 'eval_accuracy'."""
    return "eval_exact" if generates(records) else "eval_accuracy"


def generates(records: list[dict[str, Any]]) -> bool:
    """Whether the task counts examples without a mistake: its floors do."""
    return any("eval_exact" in floor for r in records for floor in (r.get("floors") or {}).values())


def mean_interval(values: list[float]) -> tuple[float | None, float | None]:
    """Mean, and half of its 95 % interval by Student's t; None for the interval of one value, or where there is none."""
    if len(values) < 2:
        return (values[0] if values else None), None
    t = float(stdtrit(len(values) - 1, 0.975))
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def fit_exponent(lengths: list[int], values: list[float]) -> tuple[float | None, float | None]:
    """Exponent p of values ~ T^p by least squares on logarithms, and its standard error; None for both below three lengths."""
    n = len(lengths)
    if n < 3:
        return None, None
    x, y = [math.log(T) for T in lengths], [math.log(v) for v in values]
    x_mean, y_mean = statistics.fmean(x), statistics.fmean(y)
    spread = math.fsum((a - x_mean) ** 2 for a in x)
    slope = math.fsum((a - x_mean) * (b - y_mean) for a, b in zip(x, y)) / spread
    residual = math.fsum((b - y_mean - slope * (a - x_mean)) ** 2 for a, b in zip(x, y))
    return slope, math.sqrt(residual / (n - 2) / spread)


def crossover(lengths: list[int], reference_s: list[float], variant_s: list[float]) -> float:
    """The length from which on the variant is faster at all longer lengths measured; log-log interpolation between two of them.

    `lengths` ascend. 0 when it is faster at every one of them, inf when it is not at the last: nothing is extrapolated.
    """
    gain = [math.log(r / v) for r, v in zip(reference_s, variant_s)]
    slower = [i for i, g in enumerate(gain) if g <= 0]
    if not slower:
        return 0.0
    i = slower[-1]
    if i == len(lengths) - 1:
        return math.inf
    a, b = math.log(lengths[i]), math.log(lengths[i + 1])
    return math.exp(a + (b - a) * -gain[i] / (gain[i + 1] - gain[i]))


def predicted_crossover(lengths: list[int], reference_s: list[float], variant_s: list[float]) -> float:
    """The length beyond those measured at which the least-squares lines of both times on log-log scales meet; inf if that is beyond FORESEEN times the longest.

    For a variant that is not faster at the last of three lengths or more.
    """
    reference, _ = fit_exponent(lengths, reference_s)
    own, _ = fit_exponent(lengths, variant_s)
    if own is None or own >= reference:
        return math.inf
    behind = statistics.fmean(math.log(v / r) for r, v in zip(reference_s, variant_s))  # of the lines, at the mean of log T
    beyond = statistics.fmean(map(math.log, lengths)) + behind / (reference - own) - math.log(lengths[-1])
    return math.inf if beyond > math.log(FORESEEN) else max(lengths[-1] * math.exp(beyond), lengths[-1])


def variants_of(records: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["cell"]["variant"] for r in records))


def lengths_of(records: list[dict[str, Any]]) -> list[int]:
    return sorted({r["cell"]["seq_len"] for r in records})


def trained(records: list[dict[str, Any]]) -> bool:
    """Whether there were training steps: what the first weights score says nothing of a variant, and is not told."""
    return any(r["cell"]["train"]["steps"] for r in records)


def headline(records: list[dict[str, Any]]) -> str:
    """Which of the eval_* metrics is the loss of the tables: 'bits_per_byte' or 'loss' (nats)."""
    return next((r["loss_name"] for r in records if r.get("loss_name")), "loss")


def reached(record: dict[str, Any], *keys: str) -> Any:
    """What stands under nested keys, or None where the cell did not come so far."""
    for key in keys:
        record = record.get(key) if record is not None else None
    return record


def check_one_experiment(records: list[dict[str, Any]]) -> None:
    """Raises UserError unless all records differ in variant, length and seed only: pooled, others would be no seeds of one cell."""
    if not records:
        raise UserError("no records: run the sweep first, or name the workdir of one that ran")
    done = [r for r in records if r["status"] != "missing"]
    for key in ("task", "model", "attention", "train", "measure"):
        for record in done:
            if record["cell"].get(key) != done[0]["cell"].get(key):
                raise UserError(
                    f"records {done[0]['id']} and {record['id']} differ in {key}: a table holds one experiment; give each its own workdir"
                )


def _row(records: list[dict], reference: list[dict], marked: set[str]) -> Row:
    ok = [r for r in records if r["status"] == "ok"]
    failed = [r for r in records if r["status"] != "ok"]
    statuses = [r["status"] for r in records]
    counts = [f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses)]
    pool = lambda summary, *keys, of=ok: summary(found) if (found := _values(of, *keys)) else None
    median, step = statistics.median, ("speed", "train_step")
    params, reference_params = (pool(median, "params", "total", of=group) for group in (records, reference))
    step_s, reference_s = pool(median, *step, "median_s"), pool(median, *step, "median_s", of=[r for r in reference if r["status"] == "ok"])
    scored = ok if trained(records) else []
    loss, loss_interval = mean_interval(_values(scored, "metrics", f"eval_{headline(records)}"))
    accuracy, accuracy_interval = mean_interval(_values(scored, "metrics", "eval_accuracy"))
    exact, exact_interval = mean_interval(_values(scored, "metrics", "eval_exact") if generates(records) else [])
    slots, slots_interval = mean_interval(_values(scored, "written", "eval_slots"))
    bleu, bleu_interval = mean_interval(_values(scored, "written", "eval_bleu"))
    rates = [(rate, fraction) for r in ok for rate, fraction in [_rate(r)] if rate is not None]
    fractions = [fraction for _, fraction in rates if fraction is not None]
    lower_s, compile_s = (pool(median, "compile", "train_step", part, of=records) for part in ("lower_s", "compile_s"))
    return Row(
        variant=records[0]["cell"]["variant"],
        seq_len=records[0]["cell"]["seq_len"],
        status=statuses[0] if len(counts) == 1 else ", ".join(counts),
        message=next((" ".join(r["message"].split()) for r in failed if r.get("message")), ""),
        seeds=len(records),
        seeds_ok=len(ok),
        params=None if params is None else int(params),
        params_differ=bool(params and reference_params and 100 * abs(params - reference_params) > reference_params),
        loss=loss,
        loss_interval=loss_interval,
        accuracy=accuracy,
        accuracy_interval=accuracy_interval,
        exact=exact,
        exact_interval=exact_interval,
        slots=slots,
        slots_interval=slots_interval,
        bleu=bleu,
        bleu_interval=bleu_interval,
        tokens_per_step=pool(median, "tokens_per_step"),
        tokens_per_s=pool(median, "tokens_per_s"),
        times_faster=reference_s / step_s if reference_s and step_s else None,
        step_s=step_s,
        step_s_p20=pool(min, *step, "p20_s"),
        step_s_p80=pool(max, *step, "p80_s"),
        forward_backward_s=pool(median, "speed", "forward_backward", "median_s"),
        compile_s=None if compile_s is None or lower_s is None else lower_s + compile_s,
        temp_bytes=pool(max, "memory", "temp_bytes", of=records),
        useful_flops_per_s=median(rate for rate, _ in rates) if rates else None,
        matmul_fraction=median(fractions) if fractions else None,
        decode_tokens_per_s=pool(median, "decode", "tokens_per_s"),
        decode_step_s=pool(median, "decode", "step", "median_s"),
        decode_step_s_p20=pool(min, "decode", "step", "p20_s"),
        decode_step_s_p80=pool(max, "decode", "step", "p80_s"),
        refeed_tokens_per_s=pool(median, "decode", "refeed_tokens_per_s"),
        state_bytes=pool(max, "decode", "state_bytes"),
        disturbed=any(r["id"] in marked for r in ok),
        backend=", ".join(dict.fromkeys(_values(records, "attention", "backend"))),
    )


def _values(records: list[dict], *keys: str) -> list:
    return [v for r in records if (v := reached(r, *keys)) is not None]


def _rate(record: dict) -> tuple[float | None, float | None]:
    """Useful FLOP/s of the train step, and its fraction of the matrix product rate measured in the same process."""
    flops, step_s = reached(record, "flops", "useful_per_step"), reached(record, "speed", "train_step", "median_s")
    if not flops or not step_s:
        return None, None
    matmul = [v for v in (reached(record, "calibration", "matmul_flops_per_s", when) for when in ("before", "after")) if v]
    return flops / step_s, flops / step_s / statistics.fmean(matmul) if matmul else None


def _floors(records: list[dict], T: int) -> list[Row]:
    at_T = [r for r in records if r["cell"]["seq_len"] == T and r.get("floors")]
    result = []
    for name in dict.fromkeys(name for r in at_T for name in r["floors"]):
        loss, _ = mean_interval(_values(at_T, "floors", name, f"eval_{headline(records)}"))
        accuracy, _ = mean_interval(_values(at_T, "floors", name, "eval_accuracy"))
        exact, _ = mean_interval(_values(at_T, "floors", name, "eval_exact"))
        slots, _ = mean_interval(_values(at_T, "floors", name, "eval_slots"))
        result.append(Row(name, T, "floor", loss=loss, accuracy=accuracy, exact=exact, slots=slots))
    return result


def _as_printed(floors: list[Row]) -> tuple:
    digits = lambda x: None if x is None else round(x, DECIMALS)
    return tuple((floor.variant, digits(floor.loss), digits(floor.accuracy), digits(floor.exact), digits(floor.slots)) for floor in floors)


def _curves(shared: list[int], reference: dict[int, Row], own: dict[int, Row]) -> list[tuple[list, list]]:
    """Times for the crossover itself, for its lower end (a slow reference, a fast variant) and for its upper end."""
    pairs = [("step_s", "step_s"), ("step_s_p80", "step_s_p20"), ("step_s_p20", "step_s_p80")]
    return [([getattr(reference[T], a) for T in shared], [getattr(own[T], b) for T in shared]) for a, b in pairs]
