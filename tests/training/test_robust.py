"""The robust filter: bad samples are found at every noise level, good ones stay, and a run's memory of them goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import TINY, launch, log_of, small_nets, stopped_at, write_clips
from torch import Tensor

from training import config, engine, losses, presets, robust
from training.config import ConfigError, Data, Drop, Loss, Stage

RELATIVE = Loss(robust_measure="quantile")

STAGE2 = replace(presets.memo_stage2().loss, robust_from=0)

# Single frames of pure noise, half of which are dropped as soon as it is known what is usual: in the second step.
HALVED = replace(
    TINY,
    data=Data(single_frames=True, frames=1),
    train=("reference", "spatial", "backbone", "face"),
    drop=Drop(reference=0.0),
    loss=Loss(pure_noise=1.0, robust_measure="quantile", robust_factor=1.0),
    optimizer=replace(TINY.optimizer, batch=16),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("data"))


def samples(count: int, bad: float, scale: float = 1.0, loss: Loss = RELATIVE) -> tuple[Tensor, Tensor, Tensor]:
    """Noise levels, errors of the velocity and which samples are bad, [N].

    What noise hides of a clean latent is Gaussian, and the more the stronger it is.
    """
    sigma = losses.draw_sigma(count, loss, torch.Generator().manual_seed(int(torch.randint(2**31, (1,)))))
    unknown = 0.001 + 0.01 * sigma.square()
    usual = unknown / ((1 - sigma).square() * unknown + sigma.square())
    is_bad = torch.rand(count) < bad
    error = scale * usual * torch.where(is_bad, 7.0, 1.0) * (0.3 * torch.randn(count)).exp()
    return sigma, error, is_bad


def judge(judged: robust.RobustFilter, sigma: Tensor, error: Tensor) -> Tensor:
    """Which samples stay [N], judged in steps of 32."""
    bins, no, stay = judged.bin_of(sigma[:, None]), torch.zeros(32, dtype=torch.bool), []
    if judged.config.robust_measure == "quantile":
        error = error * sigma.square()
    for first in range(0, len(sigma), 32):
        some = slice(first, first + 32)
        keep = losses.kept_by_filter(error[some], error[some], no, judged.limits(0)[bins[some]])
        judged.note(robust.judged(bins[some], error[some], keep, no, error[some]))
        stay.append(keep)
    return torch.cat(stay)


def test_good_samples_stay_at_every_noise_level_and_bad_ones_go() -> None:
    torch.manual_seed(0)
    sigma, error, bad = samples(64 * 512, 0.05, loss=STAGE2)
    relative, literal = (judge(robust.RobustFilter(c), sigma, error) for c in (STAGE2, Loss()))
    late = torch.arange(len(sigma)) > len(sigma) // 2
    levels = sigma[late].quantile(torch.linspace(0, 1, 33))  # twice as fine as the filter's own
    for number in range(32):
        here = late & (sigma >= levels[number]) & (sigma <= levels[number + 1])
        assert (~relative[here & bad]).float().mean() > 0.9, f"{number}: bad ones go"
        assert relative[here & ~bad].float().mean() > 0.97, f"{number}: good ones stay"
    assert error.mean() < 0.1, "and this is what the paper's one limit does at a loss that is usual there:"
    assert literal[~bad & (sigma < 0.08)].float().mean() < 0.2
    assert literal[bad & (sigma > 0.85)].float().mean() > 0.6


def test_it_neither_shuts_itself_nor_opens() -> None:
    torch.manual_seed(0)
    judged = robust.RobustFilter(RELATIVE)
    kept = [judge(judged, *samples(robust.BINS * 512, 0.0)[:2]).float().mean() for _ in range(8)]
    assert min(kept) > 0.98, "what is left out does not lower the limit further and further"
    before = judged.limits(0)
    judge(judged, *samples(robust.BINS * 512, 0.2)[:2])
    known = torch.isfinite(before)
    assert (judged.limits(0)[known] < 1.6 * before[known]).all(), "a fifth of bad ones hardly raises it"
    judge(judged, *samples(robust.BINS * 1024, 0.0, scale=20.0)[:2])
    sigma, error, _ = samples(robust.BINS * 128, 0.0, scale=20.0)
    assert judge(judged, sigma, error).float().mean() > 0.95, "where all errors rise, that is the new usual"


def test_all_noise_levels_of_a_preset_soon_know_what_is_usual() -> None:
    torch.manual_seed(0)
    judged = robust.RobustFilter(STAGE2)
    judge(judged, *samples(64 * robust.BINS, 0.05, loss=STAGE2)[:2])
    assert torch.isfinite(judged.limits(0)).all()
    assert judged.seen.min() > 32 and judged.seen.max() < 128, "each sees about as many as the others"
    assert judged.bin_of(torch.ones(1, 1)) == robust.BINS - 1 and judged.bin_of(torch.zeros(1, 1)) == 0
    names = list(judged.row()["kept_by_sigma"])
    assert names[0].startswith("0.000-0.3") and names[-1] == "0.950-1.000" and len(names) == robust.BINS


def test_who_knows_too_little_drops_nothing_and_some_say_nothing() -> None:
    judged = robust.RobustFilter(RELATIVE)
    yes, no = torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    error = torch.full((40,), 0.01)
    few = robust.LEAST - 1
    judged.note(robust.judged(torch.full((few,), 3), error[:few], yes[:few], no[:few], error[:few]))
    assert torch.isinf(judged.limits(0)).all() and judged.shares() == [None] * 3 + [1.0] + [None] * 12
    judged.note(robust.judged(torch.full((40,), 3), error * 100, yes, yes, error))  # without a portrait
    judged.note(robust.judged(torch.full((40,), 3), error * math.inf, no, no, error))  # damaged
    assert torch.isinf(judged.limits(0)).all() and judged.shares()[3] == 1.0
    judged.note(robust.judged(torch.tensor([3]), error[:1], no[:1], no[:1], error[:1]))
    assert float(judged.limits(0)[3]) == pytest.approx(3.3 * 0.01)
    assert judged.shares()[3] == round(few / (few + 1), 3)
    assert torch.isinf(robust.RobustFilter(replace(RELATIVE, robust_from=5)).limits(4)).all()


def test_a_stopped_run_goes_on_judging_as_it_did(data: Path, tmp_path: Path) -> None:
    whole = engine.train(HALVED, data, tmp_path / "whole", small_nets(), None)
    with stopped_at(3):
        engine.train(HALVED, data, tmp_path / "halved", small_nets(), None)
    resumed = engine.train(HALVED, data, tmp_path / "halved", small_nets(), None)
    rows = log_of(tmp_path / "halved")
    assert rows[0]["kept"] == 1 and all(0.2 < row["kept"] < 0.9 for row in rows[1:])
    for row, other in zip(rows, log_of(tmp_path / "whole"), strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
    one, two = (load_file(path / "state" / "model.safetensors") for path in (whole, resumed))
    assert all(torch.equal(one[key], two[key]) for key in one)
    dropped = [json.loads(line) for line in (tmp_path / "whole" / "dropped-0.jsonl").read_text().splitlines()]
    assert all(row["error"] > row["limit"] > 0 and row["sigma"] == 1 for row in dropped)


def test_processes_judge_alike(data: Path, tmp_path: Path) -> None:
    together = replace(HALVED, steps=4, optimizer=replace(HALVED.optimizer, batch=8))
    one = engine.train(replace(HALVED, steps=4), data, tmp_path / "one", small_nets(), None)
    launch(together, data, tmp_path / "two", 2)
    rows, others = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [row["kept"] for row in rows] == [row["kept"] for row in others] and rows[-1]["kept"] < 1
    found = [load_file(p / "state" / robust.FILE) for p in (one, engine.latest(tmp_path / "two"))]
    torch.testing.assert_close(found[0]["errors"], found[1]["errors"], rtol=1e-2, atol=1e-4, equal_nan=True)
    assert torch.equal(found[0]["seen"], found[1]["seen"]) and found[0]["seen"].sum() == 4 * 16


@pytest.mark.parametrize("measure", ["loss", "clean", "quantile"])
def test_shares_kept_are_logged_for_each_noise_level(data: Path, tmp_path: Path, measure: str) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = replace(HALVED, steps=1, loss=replace(HALVED.loss, robust_measure=measure, robust_threshold=0.0))
    engine.train(stage, data, tmp_path, small_nets(), None)
    share = 1.0 if measure == "quantile" else 0.0
    assert log_of(tmp_path)[-1]["kept_by_sigma"] == {"1.000-1.000": share}
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent))
    events.Reload()
    assert [event.value for event in events.Scalars("kept_by_sigma/1.000-1.000")] == [share]


def test_a_run_that_an_earlier_version_began_goes_on_as_it_was(data: Path, tmp_path: Path) -> None:
    small = ["engine.mixed_precision=no", "data.workers=0", "engine.ema=0", "engine.gradient_checkpointing=false"]
    earlier = config.override(
        presets.memo_stage3(), [*small, "steps=1", *(f"{name}={value}" for name, value in presets.EARLIER.items())]
    )
    last = engine.train(earlier, data, tmp_path, small_nets(), None)
    (last / "state" / robust.FILE).unlink()
    settings = json.loads((last / "config.json").read_text())
    for name in ("robust_factor", "robust_quantile"):
        del settings["loss"][name]
    (last / "config.json").write_text(json.dumps(settings))
    stage = presets.settings("memo_stage3", [*small, "steps=2"], tmp_path)
    assert stage.loss == Loss() and stage.drop.all == 0
    assert engine.train(stage, data, tmp_path, small_nets(), None).name == "checkpoint-0000002"
    new = presets.settings("memo_stage3", small, tmp_path / "new")
    assert new.loss == presets.memo_stage3().loss and new.loss.robust_measure == "quantile"
    assert new.drop.all == 0.05
    with pytest.raises(ConfigError, match="robust_measure was 'loss', is 'clean'"):
        other = presets.settings("memo_stage3", [*small, "loss.robust_measure=clean"], tmp_path)
        engine.train(other, data, tmp_path, small_nets(), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["loss.robust_measure=median"], "'median' is none of 'loss', 'clean', 'quantile'"),
        (["loss.robust_factor=0"], "loss.robust_factor must be above 0, got 0"),
        (["loss.robust_quantile=50"], "loss.robust_quantile must be between 0 and 1, got 50"),
        (["loss.robust_threshold=0.1", "data.single_frames=true", "data.frames=4"], "data.frames=4"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(changes: list[str], message: str) -> None:
    stage = Stage(name="any", steps=1, loss=replace(RELATIVE, robust_threshold=math.inf))
    with pytest.raises(ConfigError, match=message):
        config.override(stage, changes)


def test_another_memory_is_refused(tmp_path: Path) -> None:
    save_file({"borders": torch.zeros(robust.BINS + 1), "errors": torch.zeros(4, 4)}, tmp_path / robust.FILE)
    with pytest.raises(ConfigError, match="has no errors of"):
        robust.RobustFilter(RELATIVE).load(tmp_path)
