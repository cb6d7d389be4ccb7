"""JSON that training reads: rows, verdicts, settings and records of runs, each with one typed error."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from fuzzing import altered, assert_no_foreign, json_text

from memo_core.errors import EmotionError
from training import engine, presets, run
from training.config import ConfigError, from_json, to_json
from training.emotion.train import EmotionConfig
from training.prepare.review import read_verdicts
from training.prepare.rows import PrepareError, Row, Table

ROW = Row(
    id="abc-0-1000",
    source="a/b.mp4",
    identity="abc",
    changed=[3, 4],
    start=0.0,
    end=1.0,
    width=64,
    height=64,
    fps=25.0,
    face_box=[1.0, 2.0, 3.0, 4.0],
    box=[0.0, 0.0, 64.0, 64.0],
    looks=[[0.0, 1.0, 2.0, 3.0, 4.0]],
    quality=50.0,
    done={"faces": "x"},
    failure=["quality", "low", "x"],
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    table = Table(tmp_path / "rows.jsonl")
    table.put([ROW])
    table.save()
    assert Table(tmp_path / "rows.jsonl").rows == {ROW.id: ROW} and len(list(tmp_path.iterdir())) == 1
    for config in (presets.memo_stage1(), presets.memo_stage2()):
        assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    "change",
    [{"id": "../x"}, {"id": 3}, {"source": "/etc/passwd"}, {"source": "../x.mp4"}, {"source": "a\0b"}, {"box": "x"}]
    + [{"box": [1, 2]}, {"looks": [1]}, {"fps": "25"}, {"width": 2.5}, {"key": "a/b"}, {"error": 1}, {"done": ["x"]}]
    + [{"failure": []}, {"quality": float("nan")}, {"start": True}, {"changed": [1]}],
    ids=str,
)
def test_rows_that_make_no_sense_are_refused(tmp_path: Path, change: dict) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW.to_json() | change) + "\n")
    with pytest.raises(PrepareError, match="line 1 is not a row"):
        Table(tmp_path / "rows.jsonl")


def test_no_reader_lets_a_foreign_error_out(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    config = json.loads(to_json(presets.memo_stage2()))
    record = {"step": 3, "seconds": 1.5, "averaged_steps": 0, "started_from": "a", "data": "b", "samples_per_step": 1}
    files = {
        tmp_path / "rows.jsonl": (ROW.to_json(), lambda path: Table(path), PrepareError),
        tmp_path / "verdicts.json": (
            {"verdicts": {"a": "keep"}},
            lambda path: read_verdicts(tmp_path, path),
            PrepareError,
        ),
        run_folder / "config.json": (config, lambda path: engine.begun(path.parent), ConfigError),
        run_folder / "training.json": (record, lambda path: engine.begun(path.parent), ConfigError),
    }
    emotion = EmotionConfig()
    emotion.save(tmp_path / "emotion.json")
    given = json.loads((tmp_path / "emotion.json").read_text())
    files[tmp_path / "emotion.json"] = (given, EmotionConfig.load, EmotionError)
    for path, (value, _, _) in files.items():
        path.write_text(json.dumps(value))
    for path, (value, read, error) in files.items():
        read(path)
        for seed in range(60):
            path.write_text(json_text(altered(value, random.Random(seed))), errors="surrogateescape")
            assert_no_foreign(lambda: read(path), error)
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(error):
            read(path)
        path.unlink()
        path.write_text(json.dumps(value))


def _verdicts(path: Path) -> object:
    return read_verdicts(path.parent, path)


@pytest.mark.parametrize("state", [b"", b"x" * 99, [], {"step": "3"}, {"step": 3, "seconds": float("nan")}], ids=str)
def test_a_job_begun_with_another_file_says_so(tmp_path: Path, state: object) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(state) if isinstance(state, bytes) else torch.save(state, path)
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="delete it to begin anew"):
        run.Job(tmp_path, 3, {"m": module}, torch.optim.SGD(module.parameters(), 0.1), torch.Generator())
