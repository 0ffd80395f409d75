"""The committed core benchmark: its table is made from its records alone."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results" / "core_bench"


def report_only(out):
    """In a process of its own: absl's flags are global, and launch.py has some of the same names."""
    command = [sys.executable, str(ROOT / "experiments" / "core_bench.py"), "--report_only", f"--out={out}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_committed_table_follows_from_the_records(tmp_path):
    shutil.copy(RESULTS / "records.json", tmp_path)
    process = report_only(tmp_path)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "table.md").read_text() == (RESULTS / "table.md").read_text()


def test_without_records_there_is_one_line(tmp_path):
    process = report_only(tmp_path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "there is no" in process.stderr
