"""The side-by-side: every candidate leaves its record, ratios are those of the recorded times, and the committed table is made from its records alone."""

import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import VARIANTS, make_attention
from attn_zoo.attention.base import softmax_reference
from attn_zoo.attention.pattern import dense_mask
from attn_zoo.results import load_records, write_record
from attn_zoo.spec import Unsupported
from attn_zoo.tables import number
from tiny import ENV

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
LENGTHS = (32, 64, 128)
sys.path.insert(0, str(ROOT / "experiments"))
from bench import candidates, jax_peers, rounds
from bench.candidates import CannotRun, Jax, Lost, Problem, TorchProcess, counterparts, farthest, heads, status_of, variant
from bench.report import faster_from
from bench.rounds import MODES, measure
from bench.single_pattern import single_pattern

T, N, H = 320, 2, 8


def run(out, *options):
    """In a process of its own: absl's flags are global, and launch.py has some of the same names."""
    command = [sys.executable, str(ROOT / "experiments" / "core_bench.py"), f"--out={out}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV)


def test_where_a_variant_becomes_faster_is_predicted_from_three_lengths_on():
    """Measured at the first, between two, by two fits beyond the last; and of two lengths no more than that it was not measured."""
    curve = lambda seconds, *lengths: {T: {"status": "ok", "speed": {"median_s": seconds(T)}} for T in lengths}
    linear, square = lambda T: 3.0 * T, lambda T: 0.01 * T**2
    said = lambda own, full, *lengths: faster_from(curve(own, *lengths), curve(full, *lengths))
    assert said(linear, square, 512, 1024) == "≤ 512"
    assert said(linear, square, 256, 512, 1024) == "300"
    assert said(linear, square, 64, 128) == "> 128"
    assert said(linear, square, 32, 64, 128) == "3e+02, by the fit"
    assert said(square, linear, 1024, 2048, 4096) == "> 65536, by the fit"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("core_bench")
    lengths = ",".join(map(str, LENGTHS))
    process = run(folder, "--variants=full, linformer(rank=4), local(window=256)", f"--seq_lens={lengths}", "--N=2", "--H=8", "--rounds=1")
    assert process.returncode == 0, process.stderr
    return folder


def test_every_candidate_leaves_a_record_a_length_and_mode(folder):
    records = load_records(folder)
    names = {r["cell"]["variant"] for r in records}
    assert names >= {"full", "full, bidirectional", "linformer(rank=4)", "local", "jax.nn (xla)", "jax.nn (xla), bidirectional", "jax.nn (cudnn): window", "tokamax"}
    assert {(r["cell"]["variant"], r["cell"]["seq_len"], r["cell"]["mode"]) for r in records} == {(n, T, mode) for n in names for T in LENGTHS for mode in ("forward", "forward_backward")}
    assert len(records) == 2 * len(names) * len(LENGTHS)


def test_what_cannot_run_here_says_why(folder):
    for r in load_records(folder):
        runs = r["cell"]["variant"].startswith("jax.nn (xla)") or not r["cell"]["peer"]
        assert r["status"] == ("ok" if runs else "unsupported") and bool(r["message"]) != runs, r["cell"]


def test_ratios_exponents_and_rates_are_those_of_the_recorded_times(folder, tmp_path):
    """Of times that grow as T^2, the peers' three times those of the variants."""
    for r in load_records(folder):
        if r["status"] == "ok":
            seconds = 1e-3 * (r["cell"]["seq_len"] / 32) ** 2 * (3 if r["cell"]["peer"] else 1)
            speed = {"median_s": seconds, "p20_s": 0.9 * seconds, "p80_s": 1.2 * seconds, "n": 1}
            r |= {"speed": speed, "flops": 5e6 * seconds, "matmul_flops_per_s": 2e7, "compile": {"lower_s": 0.5, "compile_s": 1.25}}
        write_record(tmp_path, r)
    process = run(tmp_path, "--report_only")
    assert process.returncode == 0, process.stderr
    text = (tmp_path / "table.md").read_text()
    assert text.count("3.0 / 1.0 (3.00×)") == 4 and text.count("48.0 / 16.0 (3.00×)") == 4  # both directions and modes
    [row] = [line for line in text.splitlines() if line.startswith("| `linformer(rank=4)` (b)")][:1]
    assert "16.0 (3.0×)" in row and "| 2.00 " in row
    rates, spreads = text.split("**Rates at T = 128**")[1].split("**Spread and compilation at T = 128**")
    [spread] = [line for line in spreads.splitlines() if line.startswith("| `full` ")]
    assert [cell.strip() for cell in spread.strip("|").split("|")] == ["`full`", *["16.0 (14.4 to 19.2)", "1.75"] * 2]
    assert "25 %" in rates
    [full] = [r for r in load_records(folder) if (r["cell"]["variant"], r["cell"]["seq_len"], r["cell"]["mode"]) == ("full", 128, "forward")]
    pairs = full["cell"]["B"] * full["cell"]["N"] * full["plan"]["computed_pairs"]
    columns = [c.strip() for c in next(line for line in rates.splitlines() if line.startswith("| `full` ")).split("|")]
    assert columns[7] == columns[10] == number(16e9 / pairs)


@pytest.mark.parametrize("name", ["core_bench", "core_bench_backends", "core_bench_long"])
def test_the_committed_table_and_figures_follow_from_the_records(name, tmp_path):
    shutil.copytree(RESULTS / name / "records", tmp_path / "records")
    process = run(tmp_path, "--report_only")
    assert process.returncode == 0, process.stderr
    files = lambda folder: {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert (tmp_path / "table.md").read_text() == (RESULTS / name / "table.md").read_text()
    assert files(tmp_path) == files(RESULTS / name) and (len(list(tmp_path.rglob("*.png"))) > 0) == (name != "core_bench_backends"), "one length is no curve"


def test_backends_stand_beside_each_other(folder, tmp_path):
    """Of a variant that takes three times as long on the second: each is compared with `full` on its own backend."""
    for r in load_records(folder):
        if not r["cell"]["peer"]:
            for backend, factor in (("native", 1), ("xla", 3)):
                seconds = factor * 1e-3 * (r["cell"]["seq_len"] / 32) * (1 if r["cell"]["spec"] == "full" else 2)
                speed = {"median_s": seconds, "p20_s": seconds, "p80_s": seconds, "n": 1}
                write_record(tmp_path, r | {"id": r["id"] + backend, "speed": speed, "cell": r["cell"] | {"variant": f"{r['cell']['variant']} [{backend}]"}})
    process = run(tmp_path, "--report_only")
    assert process.returncode == 0, process.stderr
    lines = (tmp_path / "table.md").read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells.count(["`local [xla]`", "`local [native]`", "6.0 / 2.0 (3.00×)", "12.0 / 4.0 (3.00×)", "24.0 / 8.0 (3.00×)"]) == 2
    assert not any("jax.nn" in line for line in lines)
    assert [row[-1] for row in cells if row[0] == "`local [xla]`" and len(row) == 7] == ["> 2048, by the fit"] * 2


class Row:
    """A candidate whose calls take no time, and that fails from its `last`-th on."""

    framework = "jax"

    def __init__(self, last, process=None, tunes=False):
        self.calls, self.last, self.process, self.tunes = 0, last, process, tunes

    def prepare(self, mode):
        return {"temp_bytes": 1}

    def seconds(self, mode, calls):
        self.calls += 1
        if self.calls > self.last:
            raise CannotRun("it ran out of memory", "oom")
        return 1.0


def test_a_row_that_fails_while_it_is_timed_says_so_and_the_others_go_on():
    well, fails = Row(last=100), Row(last=5)
    outcomes = {(row, mode): outcome for row, mode, outcome in measure([well, fails], rounds=4, jobs=1)}
    assert len(outcomes) == 4
    for (row, _), outcome in outcomes.items():
        if row is well:
            assert outcome["status"] == "ok" and outcome["speed"]["n"] == 4
        else:
            assert outcome == {"temp_bytes": 1, "status": "oom", "message": "it ran out of memory"}


def test_what_the_time_does_not_suffice_for_is_left_out():
    class Slow(Row):
        def prepare(self, mode):
            time.sleep(0.2)
            return super().prepare(mode)

    rows = [Slow(last=100), Row(last=100)]
    outcomes = {(row, mode): outcome for row, mode, outcome in measure(rows, rounds=2, jobs=1, until=time.monotonic() + 0.1)}
    assert [outcomes[row, mode]["status"] for row in rows for mode in MODES] == ["ok", "timeout", "timeout", "timeout"]
    assert outcomes[rows[0], "forward"]["speed"]["n"] == 2 and rows[1].calls == 0 and "time was over" in outcomes[rows[1], "forward"]["message"]


def test_processes_prepare_beside_each_other_and_what_tunes_itself_alone():
    class Watched(Row):
        def prepare(self, mode):
            under_way.append(self)
            together.append(list(under_way))
            time.sleep(0.02)
            under_way.remove(self)
            return super().prepare(mode)

    under_way, together = [], []
    tunes = Watched(100, "first", tunes=True)
    rows = [tunes, *(Watched(100, process) for process in (None, None, "first", "second"))]
    outcomes = {(row, mode): outcome for row, mode, outcome in measure(rows, rounds=1, jobs=2)}
    assert list(outcomes) == [(row, mode) for row in rows for mode in MODES] and {o["status"] for o in outcomes.values()} == {"ok"}
    assert together[-2:] == [[tunes]] * 2 and max(map(len, together)) == 4
    assert all(len({row.process for row in rows if row.process}) == len([row for row in rows if row.process]) for rows in together), "one at a time in each process"


def test_another_process_has_a_moment_to_come_to_rest(monkeypatch):
    waits = []
    monkeypatch.setattr(rounds.time, "sleep", waits.append)
    list(measure([Row(100, process) for process in (None, None, "first", "second", "second")], rounds=2, jobs=1))
    assert waits == [rounds.PAUSE_S] * 9  # before three processes, in a first round and two more


REASONS = {
    "unsupported": [Unsupported("informer cannot attend across sequences"), NotImplementedError("no gradients"), ModuleNotFoundError("No module named 'fla'")],
    "oom": [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"), RuntimeError("CUDA out of memory."), RuntimeError("can't allocate memory: 1 bytes")],
    "error": [RuntimeError("the compiler failed"), RuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded"), Lost("the process ended")],
}


@pytest.mark.parametrize("status", REASONS)
def test_the_status_tells_what_is_refused_from_what_failed(status):
    for reason in REASONS[status]:
        if isinstance(reason, CannotRun):
            assert reason.status == status
        else:
            assert status_of(reason) == status_of(ExceptionGroup("compilers", [reason])) == status


def test_a_length_with_a_row_that_was_lost_or_left_out_is_measured_again(tmp_path):
    """Any other row is as it will be the next time."""
    common = {"settings": {"rounds": 1}, "provenance": {"git_commit": "1", "git_dirty": False, "cpu": "2", "device_kind": "cpu"}}
    for status, lost, again in (("ok", False, False), ("oom", False, False), ("error", False, False), ("unsupported", False, False), ("error", True, True), ("timeout", False, True)):
        write_record(tmp_path, {"id": "x", "cell": {"variant": "full", "seq_len": 32, "seed": 0}, "status": status, "lost": lost} | common)
        assert rounds.done(tmp_path, {"x"}, common) != again


def test_kernels_of_jax_lower_for_the_devices_that_they_are_for(monkeypatch):
    """Forward and backward."""
    shapes = [jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)] * 3
    both = lambda attend: jax.jit(lambda q, k, v: jax.vjp(lambda *x: attend(*x, is_causal=True), q, k, v)[1](q))
    for platform, lowered_for, kind, attend in (("gpu", "cuda", "NVIDIA H200", jax_peers._pallas_mha), ("tpu", "tpu", "TPU v5 lite", jax_peers._pallas_tpu)):
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
        with pytest.raises(CannotRun, match=f"its kernels are for {platform.upper()}s"):
            both(attend).lower(*shapes)
        with monkeypatch.context() as patch, jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            patch.setattr(jax, "default_backend", lambda: platform)
            assert both(attend).trace(*shapes).lower(lowering_platforms=(lowered_for,)).as_text().count("custom_call @") >= 2


def test_gradients_of_values_alone_have_no_rate(tmp_path):
    """Hard attention without a key scores all keys, and its gradients are those of the values that it looks up."""
    process = run(tmp_path, "--variants=hard", "--seq_lens=32", "--N=1", "--H=8", "--rounds=1", "--peers=none")
    assert process.returncode == 0 and {r["cell"]["mode"]: r["flops"] is None for r in load_records(tmp_path)} == {"forward": False, "forward_backward": True}, process.stderr
    [row] = [line for line in (tmp_path / "table.md").read_text().split("**Rates at")[1].split("**Spread")[0].splitlines() if line.startswith("| `hard`")]
    assert [cell.strip() == "–" for cell in row.split("|")][5:9:2] == [False, True]


def test_what_is_lost_is_an_error_to_be_measured_again():
    class Gone(Row):
        def prepare(self, mode):
            raise Lost("the process ended")

    outcomes = [outcome for *_, outcome in measure([Gone(1)], rounds=1, jobs=1)]
    assert {outcome["status"] for outcome in outcomes} == {"error"} and outcomes[0]["lost_at"] < outcomes[1]["lost_at"]


def test_a_row_whose_device_is_gone_is_lost(monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    row = Jax("row", lambda x: jax.pure_callback(fail, x, x), (jnp.ones(2),), spec="full", causal=True)
    with pytest.raises(CannotRun, match="CpuCallback error") as alone:
        row.prepare("forward")
    monkeypatch.setattr(candidates.jnp, "zeros", fail)
    with pytest.raises(Lost, match="nothing runs any more on the device"):
        row.prepare("forward")
    assert not isinstance(alone.value, Lost)


def test_a_process_that_ends_loses_its_rows_and_the_next_length_has_another(tmp_path):
    """It says what was last said of it."""
    python = tmp_path / "python"
    python.write_text(f"""#!{sys.executable}
import json, sys
for line in sys.stdin:
    asked = json.loads(line)["do"]
    if asked == "prepare":
        sys.exit("an illegal memory access")
    print(json.dumps([dict(name="sdpa", spec="full", causal=True, layer=False, tunes=False, reason=None)] if asked == "list" else dict()), flush=True)
""")
    python.chmod(0o755)
    process = TorchProcess(str(python), {})
    for T in (64, 128):
        [row] = process.candidates(Problem(1, T, N, H, "float32"))
        for mode in MODES:
            with pytest.raises(Lost, match="ended with status 1: an illegal memory access"):
                row.prepare(mode)
    process.close()


@pytest.mark.parametrize("factor, said", [(1.0, None), (1.2, "wrong: it differs from what XLA's engine gives by 0.2 of the largest value"), (float("nan"), "wrong: .* by nan")])
def test_what_a_row_gives_is_held_to_the_xla_engine(factor, said):
    problem = Problem(1, 64, N, H, "float32", checked=True)
    row = variant(problem, "local", "local(window=8)", True, heads(problem))
    right = row._function
    row._function = lambda *args: factor * right(*args)
    for mode in MODES:
        if said is None:
            assert 0 <= row.prepare(mode)["error"] < 1e-5
        else:
            with pytest.raises(CannotRun, match=said):
                row.prepare(mode)


def test_the_farthest_of_all_results_counts():
    assert farthest((jnp.array([1.0, 4.0]), jnp.array([10.0])), (jnp.array([1.0, 4.0]), jnp.array([8.0]))) == 0.25


def test_each_peer_has_its_counterpart_once():
    """A layer beside a layer, with the same projections, and attention alone beside attention alone, though the spec be one."""
    problem = Problem(1, 64, N, H, "float32")
    block = "block(block=16)"
    peers = [types.SimpleNamespace(spec=spec, causal=causal, layer=layer) for spec, causal, layer in
             [(block, False, "inputs"), (block, False, False), (block, False, False), (block, False, True), ("full", True, False), ("full", False, False)]]  # fmt: skip
    rows = counterparts(peers[4:5], [], problem, heads(problem))
    rows += counterparts(peers, rows, problem, heads(problem))
    endings = ["", ", bidirectional, with its input projections", ", bidirectional", ", bidirectional, as a layer", ", bidirectional"]
    assert [row.name for row in rows] == [spec + ending for spec, ending in zip(["full", block, block, block, "full"], endings)]
    shapes = [jax.tree.map(jnp.shape, row._function(*row._args, *row._given)) for row in rows]
    assert shapes == [(1, 64, N, H), (1, 64, N * H), (1, 64, N, H), (1, 64, N * H), (1, 64, N, H)]


def test_parameters_are_arguments_without_gradients():
    """As constants, what follows from them alone would be computed by the compiler, and not be timed."""
    problem = Problem(1, 64, N, H, "float32")
    qkv = heads(problem)
    row = variant(problem, "linformer", "linformer(rank=16)", False, qkv)
    both, args = row._call(row._function, "forward_backward")
    jaxpr = jax.make_jaxpr(both)(*args)
    assert max((np.size(x) for x in jaxpr.consts), default=0) < 16 * 64 and {np.size(x) for x in jax.tree.leaves(row._given)} == {16 * 64}
    assert [x.shape for x in jaxpr.out_avals] == 4 * [(1, 64, N, H)]  # o, dq, dk, dv


DIRECTED = [(name, causal) for name, v in VARIANTS.items() for causal in (True, False) if not causal or v.causal is True]
ATTENTIONS = {f"{name}-{'causal' if causal else 'bidirectional'}": make_attention(name, num_heads=N, head_dim=H, max_len=T, causal=causal) for name, causal in DIRECTED}
PATTERNS = {name: pattern for name, attention in ATTENTIONS.items() if (pattern := single_pattern(attention, T)) is not None}


def test_these_are_single_patterns():
    both = {"full", "local", "block", "block_local", "global_window"}
    assert PATTERNS.keys() == {f"{name}-{way}" for name in both for way in ("causal", "bidirectional")} | {f"{name}-causal" for name in ("strided", "dilated", "fixed", "axial")}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_variant_is_the_softmax_over_its_single_pattern(name):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, T, N, H))
    np.testing.assert_allclose(ATTENTIONS[name].reference(q, k, v), softmax_reference(q, k, v, dense_mask(PATTERNS[name], T, T)), atol=1e-6)


@pytest.mark.parametrize(
    "options, said",
    [(["--report_only"], "has no records yet"), (["--seq_lens=1"], "--seq_lens=1"), (["--peers=all", "--peers_python=/nowhere/python"], "--peers_python=/nowhere/python")],
    ids=["no_records", "a_length_of_1", "no_such_python"],
)
def test_bad_input_is_one_line(tmp_path, options, said):
    process = run(tmp_path, *options)
    assert process.returncode == 2 and process.stderr.strip().count("\n") == 0 and said in process.stderr


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "core_bench.py"), f"--out={tmp_path}", "--variants=full", "--seq_lens=32"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV | {"JAX_PLATFORMS": "tpu"})
    assert process.returncode == 2 and process.stderr.strip().splitlines()[-1].startswith("core_bench.py: JAX_PLATFORMS=tpu: JAX has no such device; ")
