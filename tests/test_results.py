"""Records: strict JSON, whole or not at all, in the order of the sweep; damage is named, never skipped."""

import json
import math
import os
import threading

import numpy as np
import pytest

from attn_zoo.results import load_records, load_sweep, load_with_missing, record_path, write_record
from attn_zoo.spec import UserError


def record(id, variant="full", seq_len=256, seed=0, **rest):
    return {"id": id, "status": "ok", "message": "", "cell": {"variant": variant, "seq_len": seq_len, "seed": seed}, **rest}


def write_sweep(workdir, records, order):
    cells = [{"id": id, **next(r["cell"] for r in records if r["id"] == id)} for id in order]
    experiment = {"name": "x", "task": "bytes", "model": {"D": 8}}
    (workdir / "sweep.json").write_text(json.dumps({"experiment": experiment, "cells": cells}))


def files(workdir):
    return sorted(os.listdir(workdir / "records"))


def test_a_record_comes_back_as_it_was_written(tmp_path):
    written = record("a1", metrics={"eval_loss": 1 / 3}, curve={"step": [1, 2]}, message="Łukasz | <x>", none=None)
    path = write_record(tmp_path, written)
    assert path == record_path(tmp_path, "a1") == tmp_path / "records" / "a1.json"
    assert load_records(tmp_path) == [written]
    assert files(tmp_path) == ["a1.json"]


def test_json_is_strict(tmp_path):
    numbers = {"nan": math.nan, "inf": -math.inf, "numpy": np.float32("nan"), "list": (1.0, math.nan), "array": np.array([1.5, np.inf])}
    path = write_record(tmp_path, record("a1", metrics=numbers, count=np.int64(3), flag=np.bool_(True)))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["metrics"] == {"nan": None, "inf": None, "numpy": None, "list": [1.0, None], "array": [1.5, None]}
    assert content["count"] == 3 and content["flag"] is True


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_record_and_no_other_file(tmp_path, monkeypatch, failing):
    old = record("a1", metrics={"eval_loss": 1.0})
    write_record(tmp_path, old)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_record(tmp_path, record("a1", metrics={"eval_loss": 2.0}))
    monkeypatch.undo()
    assert load_records(tmp_path) == [old]
    assert files(tmp_path) == ["a1.json"]


def test_a_reader_never_sees_part_of_a_record(tmp_path):
    write_record(tmp_path, record("a1", curve=[0] * 50_000))
    writer = threading.Thread(target=lambda: [write_record(tmp_path, record("a1", curve=[n] * 50_000)) for n in range(20)])
    writer.start()
    reads = 0
    while writer.is_alive():
        [seen] = load_records(tmp_path)  # raises when damaged
        assert seen["curve"] == [seen["curve"][0]] * 50_000
        reads += 1
    writer.join()
    assert reads and load_records(tmp_path)[0]["curve"][0] == 19, "the writer wrote all, beside a reader"


def test_what_a_killed_writer_left_is_no_record(tmp_path):
    write_record(tmp_path, record("a1"))
    (tmp_path / "records" / ".a2.json.0123abcd.tmp").write_text('{"id": "a2", "sta')
    assert [r["id"] for r in load_records(tmp_path)] == ["a1"]


def test_an_unknown_status_is_refused(tmp_path):
    with pytest.raises(UserError, match="status='okay'.*did you mean 'ok'"):
        write_record(tmp_path, {**record("a1"), "status": "okay"})


def test_order_without_a_sweep_is_by_variant_length_and_seed(tmp_path):
    for id, cell in {"a": ("local", 256, 0), "b": ("full", 1024, 0), "c": ("full", 256, 1), "d": ("full", 256, 0)}.items():
        write_record(tmp_path, record(id, *cell))
    assert [r["id"] for r in load_records(tmp_path)] == ["d", "c", "b", "a"]


def test_order_is_that_of_the_sweep_and_what_it_does_not_list_comes_last(tmp_path):
    records = [record(id, variant) for id, variant in zip("abcde", ("linear", "full", "block", "strided", "local"))]
    for r in records:
        write_record(tmp_path, r)
    write_sweep(tmp_path, records, "dba")
    assert [r["id"] for r in load_records(tmp_path)] == ["d", "b", "a", "c", "e"]  # c, e: by variant


def test_a_cell_without_a_record_stands_in_its_place_as_missing(tmp_path):
    records = [record(id, variant) for id, variant in zip("abc", ("linear", "full", "block"))]
    write_sweep(tmp_path, records, "abc")
    write_record(tmp_path, records[2])
    rows = load_with_missing(tmp_path)
    assert [(r["id"], r["status"]) for r in rows] == [("a", "missing"), ("b", "missing"), ("c", "ok")]
    assert rows[0]["cell"]["variant"] == "linear" and rows[0]["cell"]["task"] == "bytes"
    assert load_records(tmp_path) == [records[2]]


def test_an_empty_workdir_has_no_records(tmp_path):
    assert load_records(tmp_path) == load_with_missing(tmp_path) == []
    assert load_sweep(tmp_path) is None


WHOLE = json.dumps(record("a1"))
DAMAGED = {
    "empty": b"",
    "half": WHOLE[: len(WHOLE) // 2].encode(),
    "one-byte-short": WHOLE[:-1].encode(),
    "nan": WHOLE.replace('"seed": 0', '"seed": NaN').encode(),
    "not-utf8": b"\xff\xfe" + WHOLE.encode(),
    "a-list": b"[1, 2]",
    "no-status": WHOLE.replace("status", "state").encode(),
    "no-seed": WHOLE.replace("seed", "sead").encode(),
    "another-id": WHOLE.replace("a1", "b2").encode(),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_named_on_one_line(tmp_path, content):
    write_record(tmp_path, record("a0"))
    (tmp_path / "records" / "a1.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        load_records(tmp_path)
    assert str(tmp_path / "records" / "a1.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ['{"experiment": {', '{"experiment": {}}', '{"experiment": {}, "cells": [{"id": "a"}]}'])
def test_a_damaged_sweep_is_named(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match="sweep.json"):
        load_records(tmp_path)
