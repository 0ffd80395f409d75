"""The command line: a real sweep, stopped and resumed; exit statuses; and every mistake told in one line."""

import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import psutil
import pytest
from absl import flags

from attn_zoo import sweep
from attn_zoo.attention import VARIANTS
from attn_zoo.results import load_records
from tiny import ENV

ROOT = Path(__file__).parents[1]
CONFIG = """
from attn_zoo.config import Experiment, Measure, Model, Train

experiment = Experiment(
    name="tiny",
    task="bytes",
    variants=("full", "linformer(rank=4)"),
    seq_lens=(16,),
    model=Model(D=16, layers=1, N=2),
    train=Train(steps=5, tokens_per_step=64, warmup=1, eval_tokens=128),
    measure=Measure(modes=("train_step",), min_steps=2, min_seconds=0.0),
)
"""
# Starts Python with an interrupt that is heard: in the background a shell starts what it starts with SIGINT ignored, and all its children inherit that.
HEARING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a config, where `results` and `data` go."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.py").write_text(CONFIG)
    return home


@pytest.fixture
def call(home, monkeypatch, capsys):
    """launch.py in this process: (exit status, stdout, stderr) of its arguments."""
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(ROOT)
    jax.devices()  # this process has its four by now: what is set here is for the ones that launch.py starts
    monkeypatch.setenv("XLA_FLAGS", ENV["XLA_FLAGS"])
    import launch

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, arguments)])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                launch.entry()
        finally:
            flags.FLAGS.unparse_flags()
            signal.signal(signal.SIGTERM, handler)
        return end.value.code, *capsys.readouterr()

    return call


def assert_refused(result, message):
    status, out, err = result
    assert status == 2 and out == ""
    assert err.startswith("launch.py: ") and err.count("\n") == 1 and err.endswith("\n")
    assert message in err


@pytest.fixture(scope="module")
def swept(home):
    """A sweep of two cells, stopped by Ctrl-C in the second and started again: what both runs said, and left."""

    def start():
        command = [sys.executable, "-c", HEARING, str(ROOT / "launch.py"), "--config=tiny.py"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=home, env=ENV, start_new_session=True, **pipes)

    first = start()
    lines = []
    for line in first.stdout:
        lines.append(line)
        if line.startswith("[1/2]"):
            break
    running = psutil.Process(first.pid)
    while not (children := running.children(recursive=True)):
        assert first.poll() is None
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does, to the foreground group
    out, err = first.communicate(timeout=30)
    stopped = types.SimpleNamespace(lines=lines + out.splitlines(), err=err, status=first.returncode, children=children)
    left = {path.name: path.read_bytes() for path in (home / "results" / "tiny" / "records").iterdir()}

    second = start()
    out, err = second.communicate(timeout=120)
    resumed = types.SimpleNamespace(out=out, err=err, status=second.returncode)
    return types.SimpleNamespace(stopped=stopped, left=left, resumed=resumed, workdir=home / "results" / "tiny")


def test_an_interrupt_stops_children_too_and_says_how_to_go_on(swept):
    stopped = swept.stopped
    assert stopped.status == 130, stopped.err
    assert stopped.err.strip() == "stopped; what is done is in results/tiny. The same command goes on from there."
    assert [line.strip() for line in stopped.lines][0] == "2 cells" and len(swept.left) == 1
    assert [p for p in stopped.children if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def test_the_next_run_finishes_only_what_is_left(swept):
    resumed = swept.resumed
    assert resumed.status == 0, resumed.err  # unsupported is a result
    lines = resumed.out.splitlines()
    assert lines[0] == "2 cells, 1 of them done before"
    assert lines[1].startswith("[2/2] linformer(rank=4) T=16 seed=0: unsupported: linformer cannot be causal")
    for name, content in swept.left.items():
        assert (swept.workdir / "records" / name).read_bytes() == content
    assert [(r["cell"]["variant"], r["status"]) for r in load_records(swept.workdir)] == [("full", "ok"), ("linformer(rank=4)", "unsupported")]
    assert (swept.workdir / "table.md").read_text() in resumed.out and "floor: unigram" in resumed.out
    assert resumed.out.rstrip().endswith("Tables, figures and cite.bib are in results/tiny")


def test_a_finished_sweep_starts_nothing(swept, call, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    status, out, err = call("--config=tiny.py")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "2 cells, 2 of them done before" and (swept.workdir / "table.md").read_text() in out


def test_report_only_makes_the_same_report_from_the_records_alone(swept, call, tmp_path):
    for name in ("records", "sweep.json"):
        copy = shutil.copytree if (swept.workdir / name).is_dir() else shutil.copy
        copy(swept.workdir / name, tmp_path / name)
    status, out, err = call(f"--workdir={tmp_path}", "--report_only")
    assert (status, err) == (0, "")
    for name in ("table.md", "table.tex", "table.csv", "cite.bib"):
        assert (tmp_path / name).read_bytes() == (swept.workdir / name).read_bytes()
    assert (tmp_path / "table.md").read_text() in out


def test_attention_is_drawn_of_a_sweep_that_kept_its_parameters(swept, call):
    """First it did not; started again with the setting, it runs what it lacks and nothing else."""
    assert_refused(call("--plot_attention=results/tiny"), "no cell kept its parameters; run the sweep again with --set keep_parameters=True")
    before = {path.name: path.read_bytes() for path in (swept.workdir / "records").iterdir()}
    status, out, _ = call("--config=tiny.py", "--set", "keep_parameters=True")
    assert status == 0 and out.splitlines()[0] == "2 cells, 1 of them done before"
    assert before.keys() == {path.name for path in (swept.workdir / "records").iterdir()}
    status, out, err = call("--plot_attention=results/tiny")
    assert (status, err) == (0, "") and "attention/" in out and "full, T = 16, seed 0" in out
    assert {path.suffix for path in (swept.workdir / "attention").iterdir()} == {".png", ".pdf"}


def test_patterns_are_drawn_without_a_run(call, tmp_path, monkeypatch):
    from attn_zoo import pattern_figures
    from matplotlib.figure import Figure

    monkeypatch.setattr(pattern_figures, "patterns", lambda: Figure((1, 1)))  # itself: tests/test_attention_report.py
    status, out, err = call("--plot_attention=patterns", f"--workdir={tmp_path}/here")
    assert (status, err) == (0, "") and out.split() == [f"{tmp_path}/here/patterns.png", f"{tmp_path}/here/patterns.pdf"]
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["patterns.pdf", "patterns.png"]


def test_a_timeout_is_a_failure_that_stays_one_until_it_is_retried(swept, call, tmp_path):
    arguments = ("--config=tiny.py", "--variants=linear", f"--workdir={tmp_path}", "--set", "timeout_s=0.3")
    status, out, err = call(*arguments)
    assert status == 1 and err == f"1 of 1 cells failed, see {tmp_path}/logs; --retry runs them again\n"
    assert "[1/1] linear T=16 seed=0: timeout: stopped after timeout_s=0.3" in out
    status, out, _ = call(*arguments)
    assert status == 1 and out.startswith("1 cells, 1 of them done before\n")
    status, out, _ = call(*arguments, "--retry")
    assert status == 1 and out.startswith("1 cells\n")


@pytest.mark.parametrize("status, expected", [("ok", 0), ("oom", 0), ("nan", 0), ("unsupported", 0), ("timeout", 1), ("error", 1)])
def test_the_exit_status_tells_failures_from_results(status, expected, swept, call, monkeypatch, tmp_path):
    shutil.copytree(swept.workdir, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(sweep, "run", lambda *_, **__: [{"status": "ok"}, {"status": status}])
    assert call("--config=tiny.py", f"--workdir={tmp_path}")[0] == expected


def test_a_workdir_of_another_sweep_is_refused(swept, call):
    before = (swept.workdir / "sweep.json").read_bytes()
    assert_refused(call("--config=tiny.py", "--set", "model.D=32"), "workdir results/tiny belongs to another sweep: there model.D is 16, here 32")
    assert (swept.workdir / "sweep.json").read_bytes() == before


def test_list_prints_the_zoo(call):
    status, out, err = call("--list")
    assert (status, err) == (0, "")
    for name, variant in VARIANTS.items():
        assert f"\n{name}" in out and f"{variant.paper.year}: " in out
    assert "window=256" in out and "linformer cannot be causal: " in out


def test_dry_run_prints_cells_and_runs_nothing(call, tmp_path):
    arguments = ("--variants=full, linear, linformer", "--seq_lens=16,64", "--seeds=0,1", f"--workdir={tmp_path / 'work'}", f"--data_dir={tmp_path / 'data'}")
    status, out, err = call("--config=tiny.py", "--dry_run", *arguments)
    assert (status, err) == (0, "") and list(tmp_path.iterdir()) == []
    rows = [line.split() for line in out.splitlines()[2:14]]
    assert [(variant, T, seed) for _, variant, T, seed, *_ in rows] == [(v, T, s) for T in ("16", "64") for v in ("full", "linear", "linformer") for s in "01"]
    assert len({id for id, *_ in rows}) == 12
    assert all("unsupported: linformer cannot be causal" in " ".join(row) for row in rows if row[1] == "linformer")
    assert "12 cells, " in out


@pytest.mark.parametrize("experiment", ["seq_len", "causal_lm", "seq_len_gpu"])
def test_dry_run_of_the_experiments_here(experiment, call):
    status, out, err = call(f"--config={ROOT}/experiments/{experiment}.py", "--dry_run", "--seq_lens=1024", "--seeds=0")
    assert (status, err) == (0, "") and "full" in out


def launch(*arguments):
    """A whole process, as a person starts it: (exit status, stdout, stderr)."""
    process = subprocess.run([sys.executable, str(ROOT / "launch.py"), *arguments], capture_output=True, text=True, env=ENV, timeout=20)
    return process.returncode, process.stdout, process.stderr


def test_without_a_config_all_that_are_sweeps_are_named(call, monkeypatch):
    """And none of the scripts beside them."""
    monkeypatch.chdir(ROOT)
    status, _, error = call()
    named = set(re.findall(r"experiments/(\w+)\.py", error))
    assert status == 2 and named == {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"core_bench", "layer_types", "recall", "tune"}


def test_help():
    status, out, _ = launch("--help")
    assert status == 0 and "python launch.py --config=experiments/seq_len.py" in out
    assert all(f"--{flag}" in out for flag in ("config", "variants", "seq_lens", "[no]dry_run", "[no]report_only"))


def test_a_mistake_is_one_line_without_a_traceback():
    assert_refused(launch("--workdr=x"), "Unknown command line flag 'workdr'. Did you mean: workdir ?")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tiny.py"], "unexpected argument 'tiny.py'; everything is given by flags"),
        (["--retry=maybe"], "retry"),
        (["--config"], "Missing value for flag --config"),
        ([], "--config is needed, a file that defines `experiment`; available: none here"),
        (["--config=missing.py"], "--config=missing.py: there is no such file"),
        (["--config=."], "--config=.: there is no such file"),
        (["--report_only"], "--report_only needs --workdir"),
        (["--report_only", "--workdir=nothing"], "no records"),
        (["--plot_attention=nothing"], "--plot_attention=nothing: there are no records; give the workdir of a sweep"),
    ],
)
def test_what_cannot_be_a_sweep_is_refused(arguments, message, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(*arguments), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variants=ful"], "there is no attention variant 'ful'; did you mean 'full'?"),
        (["--variants=local(windw=3)"], "has no option 'windw'; did you mean 'window'?"),
        (["--variants=local(window=-1)"], "local(window=-1): window=-1: must be a whole number of at least 0"),
        (["--variants=local(window=x)"], "must be literals"),
        (["--variants=local("], "cannot read 'local('"),
        (["--variants=local(**{'window': 3})"], "local"),
        (["--variants="], "cannot read ''"),
        (["--variants=[full, linear]"], "[full, linear]: a list of 2 variants, where layers=1"),
        (["--seq_lens=512,many"], "--seq_lens: 'many' is not a whole number"),
        (["--seq_lens=1"], "seq_lens=1: must be a whole number of at least 2"),
        (["--seq_lens="], "seq_lens=(): must not be empty"),
        (["--seeds=1.5"], "--seeds: '1.5' is not a whole number"),
        (["--seeds=-1"], "seeds=-1: must be a whole number of at least 0"),
        (["--set", "train.stps=3"], "there is no 'train.stps'; did you mean 'train.steps'?"),
        (["--set", "train.steps=many"], "must be of type int"),
        (["--set", "train.steps=-1"], "steps=-1: must be a whole number of at least 0"),
        (["--set", "train.steps"], "write key=value"),
        (["--set", "model.norm=layer"], "must be one of 'layernorm', 'rmsnorm'"),
        (["--set", "attention.backend=cuda"], "attention.backend='cuda': must be one of auto, xla, native, cudnn"),
        (["--set", "task=byte"], "there is no task 'byte'; did you mean 'bytes'?"),
        (["--set", "task=bytes(objektive='causal')"], "task 'bytes' has no option 'objektive'; did you mean 'objective'?"),
        (["--set", "task=bytes(objective='mask')"], "did you mean 'masked'?"),
        (["--set", "task=listops"], "seq_len=16: must be at least max_length=2000"),
        (["--set", "model.positions=rotary", "--set", "model.H=5"], "H=5"),
    ],
)
@pytest.mark.parametrize("mode", ["sweep", "dry_run"])
def test_bad_settings_are_refused_before_anything_is_made(mode, arguments, message, call, tmp_path):
    work = [f"--workdir={tmp_path / 'work'}", f"--data_dir={tmp_path / 'data'}"]
    assert_refused(call("--config=tiny.py", *arguments, *work, *(["--dry_run"] if mode == "dry_run" else [])), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, message",
    [
        ("experiment = (", "SyntaxError"),
        ("from attn_zoo.confg import Experiment", "ModuleNotFoundError: No module named 'attn_zoo.confg'"),
        ("raise ValueError('one\\ntwo')", "ValueError: one"),
        ("import sys; sys.exit('no')", "no"),
        ("experiment = 3", "must define `experiment`, an attn_zoo.config.Experiment"),
        ("", "must define `experiment`"),
        (CONFIG.replace("D=16", "D=15"), "D=15: must be a multiple of N=2"),
        (CONFIG.replace("steps=5", "stps=5"), "unexpected keyword argument 'stps'"),
        (CONFIG.replace("(16,)", "16"), "seq_lens"),
        (CONFIG.replace('("full", "linformer(rank=4)")', '"full"'), "variants"),
    ],
)
def test_a_broken_config_is_refused_by_name(content, message, call, tmp_path):
    config, work = tmp_path / "broken.py", tmp_path / "work"
    config.write_text(content)
    result = call(f"--config={config}", "--dry_run", f"--workdir={work}")
    assert_refused(result, message)
    assert f"--config={config}: " in result[2] and not work.exists()


def test_a_script_is_no_experiment(call):
    assert_refused(call(f"--config={ROOT}/experiments/core_bench.py", "--dry_run"), "core_bench.py")


@pytest.mark.parametrize("flag", ["workdir", "data_dir"])
@pytest.mark.parametrize("inside", ["", "/inside"])
def test_a_folder_that_cannot_be_made_is_refused(flag, inside, call, tmp_path):
    (tmp_path / "file").write_text("mine")
    others = {"workdir": tmp_path / "work", "data_dir": tmp_path / "data"} | {flag: f"{tmp_path}/file{inside}"}
    status, _, err = call("--config=tiny.py", *(f"--{name}={path}" for name, path in others.items()))
    assert (status, err.count("\n")) == (2, 1) and f"{tmp_path}/file" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_record_is_named(swept, call, tmp_path):
    shutil.copytree(swept.workdir, tmp_path, dirs_exist_ok=True)
    damaged = sorted((tmp_path / "records").iterdir())[0]
    damaged.write_text('{"id": ')
    for arguments in (["--report_only"], ["--config=tiny.py"]):
        assert_refused(call(*arguments, f"--workdir={tmp_path}"), f"{damaged}: damaged or half-written")
