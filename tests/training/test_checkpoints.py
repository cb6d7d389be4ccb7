"""A run's checkpoints: written by the clock, exported apart, as large as was said, and whole when the disk is full."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_training as runs
import torch
from small_training import TINY, launch, small_nets
from test_training import assert_same_state, weights_of

from memo_core import MemoPipeline
from training import __main__ as command
from training import checkpoints, config, disk, engine, export
from training.config import ConfigError, Stage
from training.disk import DiskError
from training.toon import jobs

data, encoders = runs.data, runs.encoders


def with_engine(**settings: object) -> Stage:
    return replace(TINY, engine=replace(TINY.engine, **settings))


@pytest.fixture(scope="module")
def whole(data: Path, encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, of which checkpoints 4 and 6 are left."""
    folder = tmp_path_factory.mktemp("whole")
    engine.train(TINY, data, folder, small_nets(), encoders)
    return folder


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The same run, stopped after step 4."""
    shutil.copytree(whole, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-0000006")
    return tmp_path / "stopped"


def forget_what_is_new(out: Path) -> Path:
    """Makes a run what it was: all checkpoints exported, and nothing said of sizes, minutes and encoders."""
    for folder in engine.checkpoints(out):
        if not export.is_exported(folder):
            shutil.copytree(export.export(folder), folder, dirs_exist_ok=True)
        (folder / "state" / "sizes.json").unlink()
        settings, record = (json.loads((folder / name).read_text()) for name in ("config.json", "training.json"))
        del settings["engine"]["save_minutes"], settings["engine"]["export_every"], record["encoders"]
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "training.json").write_text(json.dumps(record))
    return out


def test_between_the_steps_only_the_state_is_written_and_the_end_is_exported(whole: Path) -> None:
    before, last = engine.checkpoints(whole)
    assert MemoPipeline.from_pretrained(last).default_size
    assert {path.name for path in before.iterdir()} == {"state", "config.json", "training.json"}


def test_a_state_holds_the_weights_that_its_export_has(data: Path, encoders: Path, tmp_path: Path) -> None:
    """Averages of what learns, and the rest as it was."""
    stage = replace(with_engine(export_every=2), steps=4, train=("audio", "memory"))
    engine.train(stage, data, tmp_path, small_nets(), encoders)
    wanted = weights_of(tmp_path / "checkpoint-0000002")
    for path in (tmp_path / "checkpoint-0000002").iterdir():
        if path.is_dir() and path.name != "state":
            shutil.rmtree(path)
    made = export.export(tmp_path / "checkpoint-0000002")
    assert made == tmp_path / "export-0000002" and MemoPipeline.from_pretrained(made).default_size
    read = export.read_nets(tmp_path / "checkpoint-0000002").state_dict()
    for weights in (weights_of(made), read):
        assert weights.keys() == wanted.keys() and all(torch.equal(weights[key], wanted[key]) for key in wanted)


def test_the_command_exports_a_run_that_was_stopped(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["export", str(stopped), "--out", str(tmp_path / "made")])
    assert "made holds the weights\n" in capsys.readouterr().out
    assert MemoPipeline.from_pretrained(tmp_path / "made").default_size
    with pytest.raises(SystemExit, match="there is .*made already: delete it"):
        command.main(["export", str(stopped), "--out", str(tmp_path / "made")])
    with pytest.raises(SystemExit, match="no checkpoint at .*nowhere"):
        command.main(["export", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("start", ["run", "checkpoint", "old run"])
def test_a_run_starts_from_the_newest_weights_of_another(data: Path, stopped: Path, tmp_path: Path, start: str) -> None:
    """Exported or not."""
    if start == "old run":
        forget_what_is_new(stopped)
    folder = stopped / "checkpoint-0000004" if start == "checkpoint" else stopped
    settings = ["steps=1", "optimizer.batch=1", "data.workers=0", "engine.mixed_precision=no"]
    arguments = ["--data", str(data), "--out", str(tmp_path / "second"), "--start", str(folder)]
    command.main(["train", "memo_stage3", *arguments, "--set", *settings])
    old = export.read_nets(stopped / "checkpoint-0000004").state_dict()
    new = weights_of(tmp_path / "second" / "checkpoint-0000001")
    frozen = [key for key in old if key.startswith("reference_net")]
    assert frozen and all(torch.equal(old[key], new[key]) for key in frozen)
    assert (tmp_path / "second" / "checkpoint-0000001" / "vae").is_dir(), "the first run's encoders come along"


def test_a_run_begun_before_goes_on(data: Path, encoders: Path, whole: Path, stopped: Path) -> None:
    last = engine.train(TINY, data, forget_what_is_new(stopped), small_nets(), encoders)
    assert_same_state(whole / "checkpoint-0000006", last)
    assert len(engine.checkpoints(stopped)) == TINY.engine.keep


def test_weights_asked_for_stay_when_their_state_goes(data: Path, tmp_path: Path) -> None:
    engine.train(with_engine(export_every=2, keep=1), data, tmp_path, small_nets(), None)
    found = engine.checkpoints(tmp_path)
    assert [path.name for path in found] == ["checkpoint-0000002", "checkpoint-0000004", "checkpoint-0000006"]
    assert [(path / "state").is_dir() for path in found] == [False, False, True]
    assert all(len(weights_of(path)) > 100 for path in found)
    shutil.rmtree(found[-1])
    with pytest.raises(ConfigError, match="checkpoint-0000004 holds weights and no state/ to go on from"):
        engine.train(TINY, data, tmp_path, small_nets(), None)


def test_what_was_not_exported_in_time_is_kept_whole(data: Path, stopped: Path) -> None:
    """Weights asked for when the run goes on: its earlier steps have them in the state alone."""
    engine.train(with_engine(export_every=4, keep=1), data, stopped, small_nets(), None)
    assert [path.name[-1] for path in engine.checkpoints(stopped)] == ["4", "6"]
    assert len(weights_of(export.export(stopped / "checkpoint-0000004"))) > 100


def test_a_run_that_goes_on_leaves_an_export_alone(data: Path, stopped: Path) -> None:
    """Which may be writing; what is left of a checkpoint goes."""
    for name in ("export-0000004.tmp", "checkpoint-0000006.tmp"):
        (stopped / name).mkdir()
    engine.train(with_engine(keep=9), data, stopped, small_nets(), None)
    assert [path.name for path in stopped.glob("*.tmp")] == ["export-0000004.tmp"]


def test_a_checkpoint_waits_for_all_processes(data: Path, tmp_path: Path) -> None:
    """One that is late with its part of the state."""
    late = (
        "import os, time, accelerate\n"
        "save = accelerate.Accelerator.save_state\n"
        "wait = lambda *rest: time.sleep(3 * (os.environ['RANK'] == '1')) or save(*rest)\n"
        "accelerate.Accelerator.save_state = wait"
    )
    launch(replace(TINY, steps=1), data, tmp_path, 2, late)
    (last,) = tmp_path.glob("checkpoint-*")
    states = sorted(path.name for path in (last / "state").glob("random_states_*"))
    assert last.suffix == "" and states == ["random_states_0.pkl", "random_states_1.pkl"]


@pytest.mark.parametrize("main", [True, False])
def test_only_the_first_process_takes_back_what_was_not_finished(tmp_path: Path, main: bool) -> None:
    def full(state: str) -> None:
        Path(state).mkdir(parents=True)
        raise OSError("no space left on device")

    one = SimpleNamespace(is_main_process=main, wait_for_everyone=lambda: None, save_state=full)
    size = disk.CheckpointSize(weights=0, optimizer=0, average=0, export=0)
    of = checkpoints.Checkpoints(tmp_path, TINY, one, small_nets(), None, "", "", None, "", size, always=False)
    with pytest.raises(DiskError, match="no space left"):
        of.save(torch.nn.Identity(), 2, 1.0)
    assert (tmp_path / "checkpoint-0000002.tmp").is_dir() != main


def test_a_checkpoint_is_written_when_the_last_one_is_old(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of steps of 20 minutes each, and one every 45."""
    step, now = engine.Trainer._step, [0.0]

    def slow(trainer: engine.Trainer, *rest: object) -> float:
        now[0] += 20 * 60
        return step(trainer, *rest)

    monkeypatch.setattr(engine.Trainer, "_step", slow)
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stage = replace(with_engine(save_every=0, save_minutes=45.0, keep=9), steps=7)
    engine.train(stage, data, tmp_path, small_nets(), None)
    assert [path.name[-1] for path in engine.checkpoints(tmp_path)] == ["3", "6", "7"]


@pytest.mark.parametrize("kind", ["whole", "part", "no average"])
def test_what_a_checkpoint_takes_is_said_before(data: Path, tmp_path: Path, kind: str, capsys) -> None:
    changes = {"whole": {}, "part": {"train": ("audio",)}, "no average": {"engine": replace(TINY.engine, ema=0.0)}}
    stage = replace(TINY, steps=2, **changes[kind])
    last = engine.train(stage, data, tmp_path, small_nets(), None)
    said = capsys.readouterr().err
    nets = small_nets()
    learning = [p for name, parameters in nets.parts().items() if name in stage.train for p in parameters]
    size = disk.checkpoint_size(nets, learning, stage)
    state = sum(path.stat().st_size for path in (last / "state").iterdir())
    assert size.state == pytest.approx(state, rel=0.05)
    assert size.export == pytest.approx(disk.taken([last]) - state, rel=0.05)
    assert f"a checkpoint takes {disk.gigabytes(size.state)} to go on from" in said
    assert disk.gigabytes(disk.most(size, stage)) in said
    assert disk.most(size, stage) == 3 * size.state + size.export


def test_a_run_whose_checkpoints_find_no_room_does_not_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = small_nets()
    needed = disk.most(disk.checkpoint_size(nets, nets.parameters(), TINY), TINY)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(DiskError, match=r"MB are needed for .*MB are free: free some, keep fewer \(engine.keep\)"):
        engine.train(TINY, data, tmp_path / "run", small_nets(), None)
    assert not engine.checkpoints(tmp_path / "run")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    engine.train(replace(TINY, steps=1), data, tmp_path / "run", small_nets(), None)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_disk_that_fills_up_ends_the_run_and_leaves_the_last_checkpoint(
    data: Path, whole: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    kept = engine.latest(stopped)
    expected = "the checkpoint of step 6 could not be written: .* goes on from .*checkpoint-0000004"
    if moment == "before":
        usage, step = shutil.disk_usage(stopped), engine.Trainer._step
        with monkeypatch.context() as patch, pytest.raises(DiskError, match=expected):

            def filling(trainer: engine.Trainer, *rest: object) -> float:
                patch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=1000))
                return step(trainer, *rest)

            patch.setattr(engine.Trainer, "_step", filling)
            engine.train(TINY, data, stopped, small_nets(), None)
    else:
        with files_of_at_most(100_000), pytest.raises(DiskError, match=expected):
            engine.train(TINY, data, stopped, small_nets(), None)
    assert engine.checkpoints(stopped) == [kept] and not list(stopped.glob("*.tmp"))
    last = engine.train(TINY, data, stopped, small_nets(), None)
    assert_same_state(whole / "checkpoint-0000006", last)


def test_the_next_toon_stage_takes_a_state_too(
    data: Path, encoders: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "toon"
    shutil.copytree(data, folder / "data" / "clips")
    shutil.copytree(encoders, folder / "checkpoint")
    shutil.copytree(stopped, folder / "stage1")
    monkeypatch.setitem(jobs.STAGES, "stage2", lambda: replace(TINY, steps=1))
    last = jobs.train_stage("stage2", folder)
    assert last.name == "checkpoint-0000001" and (last / "vae").is_dir()


def test_adapters_ask_for_a_checkpoint_that_is_exported(data: Path, whole: Path, stopped: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = ["steps=1", "optimizer.bits=32", "optimizer.batch=1", "data.workers=0", "lora.rank=2"]
    out = ["--data", str(data), "--out", str(tmp_path / "lora"), "--set", *settings]
    with pytest.raises(SystemExit, match="python -m training export .*checkpoint-0000004"):
        command.main(["train", "memo_lora", "--start", str(stopped), *out])
    command.main(["train", "memo_lora", "--start", str(whole), *out])
    with pytest.raises(SystemExit, match="holds adapters: give the checkpoint they belong to"):
        command.main(["train", "memo_lora", "--start", str(tmp_path / "lora"), *out])


@pytest.mark.parametrize("change", ["engine.save_every=-1", "engine.save_minutes=nan", "engine.export_every=-2"])
def test_impossible_times_are_refused(change: str) -> None:
    with pytest.raises(ConfigError, match=f"{change.split('=')[0]} must be 0 or more"):
        config.override(TINY, [change])


def test_minutes_of_the_large_stages_are_kept_by_the_clock() -> None:
    for name in ("memo_stage1", "memo_stage2", "memo_stage3"):
        settings = config.override(runs.presets.PRESETS[name](), []).engine
        assert settings.save_every == 0 and 30 <= settings.save_minutes <= 60
