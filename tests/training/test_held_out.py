"""Which clips a run sees, how often, and which it never trains on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_training as runs
import torch
from common import relative_l2
from small_training import SIZE, SIZES, TINY, log_of, small_nets, stopped_at
from test_shards import WINDOWS, clip
from test_training import assert_same_state

from memo_core import MemoPipeline, MemoryState, Reference
from memo_core.inputs.portrait import crop_region
from memo_core.memory.cache import MemoryCache
from memo_core.sampling.conditions import Conditioner
from memo_core.sampling.job import WindowInputs
from memo_core.sampling.settings import Settings
from memo_core.sampling.window import sample_window
from training import __main__ as command
from training import batches, budget, config, engine, losses, presets, preview
from training.config import Data, Loss
from training.nets import Nets, link_encoders
from training.objectives import flow
from training.prepare.rows import Row
from training.shard_index import INDEX, crop_scale
from training.shards import ShardError, Shards, ShardWriter
from training.split import SAME_FACE, split, stable_hash
from training.toon import sizes
from training.validation import validate

encoders = runs.encoders


def face(*people: int) -> torch.Tensor:
    """A face embedding like that of a person; of several, like each of theirs (cosine 0.7 for two)."""
    each = [torch.randn(512, generator=torch.Generator().manual_seed(person)) for person in people]
    return 7 * torch.stack(each).sum(0) / 20


def write(folder: Path, clips: Iterable[tuple[str, str, tuple[int, ...]]], **more: Any) -> Shards:
    """Adds clips: key, video, and whose face they show."""
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for key, video, people in clips:
            tensors = clip() | {"face_embedding": face(*people)} if people else clip()
            writer.add(key, tensors, {"video": video, **more})
    return Shards(folder)


def spread(count: int) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(f"{video}-{part}", f"video{video}", ()) for video in range(count) for part in range(2)]


def keys(shards: Shards, numbers: list[int]) -> set[str]:
    return {shards.samples[number].key for number in numbers}


# --- The split --------------------------------------------------------------------------------------------------------


def test_a_video_is_on_one_side_for_good(tmp_path: Path) -> None:
    shards = write(tmp_path, spread(60))
    trained, held_out = (keys(shards, side) for side in split(shards, 0.2))
    assert trained | held_out == keys(shards, list(range(120))) and not trained & held_out
    assert 6 <= len({key.split("-")[0] for key in held_out}) <= 24, "a fifth of the videos, as the hash falls"
    assert sum(stable_hash(f"video{number}") < 0.2 for number in range(10_000)) == pytest.approx(2000, abs=100)
    assert not {key.split("-")[0] for key in trained} & {key.split("-")[0] for key in held_out}
    more = write(tmp_path, [(f"{v}-{part}", f"video{v}", ()) for v in range(30, 90) for part in range(2, 4)])
    after = [keys(more, side) for side in split(more, 0.2)]
    assert trained <= after[0] and held_out <= after[1] and len(after[1]) > len(held_out)
    assert split(shards, 0.0) == (list(range(120)), [])


def test_a_face_is_on_one_side_for_good(tmp_path: Path) -> None:
    clips = [(f"{person}-{part}", f"video {person}-{part}", (person,)) for part in range(3) for person in range(40)]
    clips += [(f"like two {person}", f"video {person}", (person, person + 1)) for person in range(39)]
    shards = write(tmp_path, [*clips, ("nobody", "a drawing", ())])
    trained, held_out = split(shards, 0.2)
    assert len({shards.samples[number].key.split("-")[0] for number in held_out}) >= 4
    faces = torch.stack([face(*people) for _, _, people in clips])
    alike = torch.nn.functional.normalize(faces) @ torch.nn.functional.normalize(faces).T > SAME_FACE
    shown = [[number for number in side if number < len(clips)] for side in (trained, held_out)]
    assert not alike[shown[0]][:, shown[1]].any()
    left = set(range(len(clips))) - set(trained) - set(held_out)
    assert left and all(alike[n, shown[0]].any() and alike[n, shown[1]].any() for n in left), "like one on each side"
    # A video that a face has brought to the other side than its name's hash takes its other clips along.
    known, moved = (int(clips[side[0]][2][0]) for side in shown)
    name = next(f"name {n}" for n in range(99) if stable_hash(f"held out name {n}") < 0.2)
    shards = write(tmp_path, [("friend", name, (known,)), ("nobody else", name, ()), ("both", name, (moved,))])
    trained, held_out = split(shards, 0.2)
    assert {"friend", "nobody else"} <= keys(shards, trained) and "both" not in keys(shards, [*trained, *held_out])

    before = [keys(shards, side) for side in (trained, held_out)]
    more = write(tmp_path, [(f"more {person}", f"more {person}", (person,)) for person in range(20, 60)])
    after = [keys(more, side) for side in split(more, 0.2)]
    assert before[0] < after[0] and before[1] < after[1]


def test_of_a_few_people_one_is_held_out(tmp_path: Path) -> None:
    """Ten, of whom a share of 0.01 is nobody in nine draws of ten; who was trained on stays so when others come."""
    for draw in range(1, 7):
        folder = tmp_path / str(draw)
        clips = [(f"{p}-{part}", f"{draw} {p}-{part}", (p,)) for part in range(3) for p in range(10)]
        shards = write(folder, clips)
        before = trained, held_out = [keys(shards, side) for side in split(shards, 0.01)]
        assert len(trained) == 27 and len(held_out) == 3 and len({key.split("-")[0] for key in held_out}) == 1
        more = write(folder, [(f"{p}-{part}", f"{draw} {p}-{part}", (p,)) for part in range(3, 5) for p in range(20)])
        after = [keys(more, side) for side in split(more, 0.01)]
        assert before[0] < after[0] and after[1] and not after[1] & trained
    alone = write(tmp_path / "alone", [("a", "one", (1,)), ("b", "other", (1,)), ("c", "one", ())])
    assert split(alone, 0.01) == ([0, 1, 2], []), "of one group nothing is"


def test_what_was_learned_from_is_never_held_out(tmp_path: Path) -> None:
    """Though the clip that had drawn it to the trained side is gone."""
    name, another = [f"name {n}" for n in range(99) if stable_hash(f"held out name {n}") < 0.2][:2]
    other = next(f"name {n}" for n in range(99) if stable_hash(f"held out name {n}") > 0.2)
    away = [(f"far {n}", f"far {n}", (50 + n,)) for n in range(20)]
    old = write(tmp_path / "old", [("first", other, (1,)), ("second", name, (1,)), *away])
    trained, held_out = (keys(old, side) for side in split(old, 0.2))
    assert {"first", "second"} <= trained and held_out
    new = write(tmp_path / "new", [("third", another, (1,)), *away, ("second", name, (1,))])
    assert {"second", "third"} <= keys(new, split(new, 0.2)[1]), "by themselves"
    after = [keys(new, side) for side in split(new, 0.2, trained)]
    assert {"second", "third"} <= after[0] and held_out == after[1]


def test_shards_of_before_tell_their_videos_too(tmp_path: Path) -> None:
    """An index without videos and crops, as all were: they stand in each sample's .json, or what tells them."""
    looks = [[0.2, 400.0, 400.0, 500.0, 480.0], [0.4, 402.0, 400.0, 502.0, 480.0]]
    boxes = [[380.0, 375.0, 510.0, 505.0], [380.0, 375.0, 530.0, 525.0], None, [380.0, "375", 510.0, 505.0]]
    with ShardWriter(tmp_path, samples_per_shard=3) as writer:
        for number, box in enumerate(boxes):
            about = {"identity": f"video{number // 2}", "box": box, "looks": looks}
            writer.add(f"clip{number}", clip(), about)
        writer.add("drawn", clip())
    shards = Shards(tmp_path)
    assert {
        len(sample) for shard in json.loads((tmp_path / INDEX).read_text())["shards"] for sample in shard["samples"]
    } == {4}
    assert shards.videos() == ["video0", "video0", "video1", "video1", "sample drawn"]
    assert shards.crop_scale == pytest.approx(1.4)


def test_the_index_tells_videos_and_crops_also_after_samples_are_removed(tmp_path: Path) -> None:
    write(tmp_path, [(f"clip{number}", f"video{number}", ()) for number in range(4)], crop_scale=1.3)
    write(tmp_path, [("wide", "video4", ())], crop_scale=1.8)
    with ShardWriter(tmp_path) as writer:
        writer.remove({"clip1"})
    shards = Shards(tmp_path)
    assert [sample.video for sample in shards.samples] == ["video0", "video2", "video3", "video4"]
    assert shards.videos() == ["video0", "video2", "video3", "video4"]
    assert shards.crop_scale == pytest.approx((3 * 1.3 + 1.8) / 4)
    with (
        ShardWriter(tmp_path) as writer,
        pytest.raises(ShardError, match="crop_scale .* numbers above 0, received .*-1"),
    ):
        writer.add("odd", clip(), {"crop_scale": -1.0})


def test_clips_of_two_rates_are_refused(tmp_path: Path) -> None:
    assert write(tmp_path, [("a", "video0", ())]).fps is None
    assert write(tmp_path, [("b", "video1", ())], encoded_fps=25.0).fps == 25
    shards = write(tmp_path, [("c", "video2", ())], encoded_fps=30.0)
    with pytest.raises(ShardError, match="25, 30 frames a second: encode all at one --fps"):
        shards.fps  # noqa: B018


@pytest.mark.parametrize(
    "metadata",
    [{"video": 3}, {"crop_scale": 0.0}, {"crop_scale": "1"}, {"encoded_fps": 0.0}, {"other": 1}, 1, {"video": None}],
)
def test_an_index_with_odd_metadata_is_refused(tmp_path: Path, metadata: Any) -> None:
    write(tmp_path, [("clip", "video", ())])
    index = json.loads((tmp_path / INDEX).read_text())
    index["shards"][0]["samples"][0][4:] = [metadata]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ShardError, match="damaged"):
        Shards(tmp_path)


# --- Samples ----------------------------------------------------------------------------------------------------------


def test_nothing_that_is_held_out_is_drawn(tmp_path: Path) -> None:
    write(tmp_path, spread(30))
    data = batches.TrainingSet(tmp_path, replace(WINDOWS, data=Data(held_out=0.2)))
    held_out = batches.HeldOut(data)
    seen = {key for number in range(3 * len(data)) for key in data[number].keys}
    kept = {key for number in range(len(held_out)) for key in held_out[number].keys}
    assert seen == keys(data.shards, data.usable) and kept == keys(data.shards, data.held_out)
    assert len(seen) + len(kept) == 60 and not seen & kept


def test_samples_held_out_are_the_same_when_others_join_them(tmp_path: Path) -> None:
    config = replace(WINDOWS, data=Data(held_out=0.3))
    write(tmp_path, spread(30))
    before = batches.HeldOut(batches.TrainingSet(tmp_path, config))
    write(tmp_path, [(f"more {number}", f"video{1000 + number}", ()) for number in range(20)])
    after = batches.HeldOut(batches.TrainingSet(tmp_path, config))
    assert len(after) > len(before)
    by_key = {after[number].keys: after[number] for number in range(len(after))}
    for number in range(len(before)):
        sample = before[number]
        same = by_key[sample.keys]
        assert torch.equal(sample.noise, same.noise) and torch.equal(sample.latents, same.latents)
        assert not sample.no_reference and not sample.no_audio and int(sample.emotion) == 3


def test_clips_come_as_often_as_they_are_long(tmp_path: Path) -> None:
    """30 s count as ten times 3 s; in an epoch no second comes twice, and all of them come."""
    with ShardWriter(tmp_path) as writer:
        writer.add("long", clip(frames=900))
        writer.add("short", clip(frames=90))
        writer.add("one window", clip(frames=16))
    config = replace(WINDOWS, data=Data(by_length=True))
    data = batches.TrainingSet(tmp_path, config, samples_together=2)
    assert len(data) == 56 + 5 + 1
    orders = []
    for epoch in range(2):
        samples = [data[number] for number in range(epoch * 62, (epoch + 1) * 62)]
        assert Counter(sample.keys[0] for sample in samples) == {"long": 56, "short": 5, "one window": 1}
        starts = sorted(int(s.latents[0, 0, 0, 0, 0]) for s in samples if s.keys == ("long",))
        for stretch, start in enumerate(starts):
            assert stretch * 885 // 56 <= start < (stretch + 1) * 885 // 56
        orders.append([int(sample.latents[0, 0, 0, 0, 0]) for sample in samples])
    assert orders[0] != orders[1]
    later = batches.loader(batches.TrainingSet(tmp_path, config, samples_together=2), 2, 20)
    assert torch.equal(next(later).noise, batches.collate([data[40], data[41]]).noise)


@pytest.mark.parametrize("single", [False, True])
def test_the_portrait_is_not_what_is_to_be_made(tmp_path: Path, single: bool) -> None:
    write(tmp_path, [("clip", "video", ())])
    config = Data(single_frames=single, frames=4 if single else 16, portrait_outside=True)
    data = batches.TrainingSet(tmp_path, replace(WINDOWS, data=config))
    portraits = set()
    for number in range(200):
        sample = data[number]
        portrait = float(sample.portrait[0, 0, 0, 0])
        assert portrait not in sample.latents[0, 0, :, 0, 0].tolist()
        portraits.add(portrait)
    assert len(portraits) > 30, "any other"
    before = batches.TrainingSet(tmp_path, replace(WINDOWS, data=replace(config, portrait_outside=False)))
    samples = [before[number] for number in range(200)]
    assert any(float(s.portrait[0, 0, 0, 0]) in s.latents[0, 0, :, 0, 0].tolist() for s in samples), "any, as it was"


def test_a_clip_of_nothing_else_is_its_own_portrait(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add("window", clip(frames=16))
    config = replace(WINDOWS, data=Data(portrait_outside=True))
    assert int(batches.TrainingSet(tmp_path, config)[0].portrait[0, 0, 0, 0]) == 0


def test_windows_are_as_long_as_the_networks(tmp_path: Path) -> None:
    write(tmp_path, [("clip", "video", ())])
    data = batches.TrainingSet(tmp_path, replace(WINDOWS, data=Data(past_windows=(2,))), window=12)
    for number in range(20):
        sample = data[number]
        first, known = int(sample.latents[0, 0, 0, 0, 0]), int(sample.past_windows)
        assert sample.latents.shape[2] == 12 and sample.past.shape[1] == 24 and known == min(2, max(1, first // 12))
        if first >= 24:
            assert sample.past[0, :, 0, 0, 0].tolist() == list(range(first - 24, first))
    with pytest.raises(batches.ConfigError, match="data.frames=8 .* the networks' 12 frames"):
        batches.TrainingSet(tmp_path, replace(WINDOWS, data=Data(frames=8)), window=12)


def test_noise_reaches_the_level_at_which_sampling_begins() -> None:
    def drawn(config: Loss) -> torch.Tensor:
        return losses.draw_sigma(20_000, config, torch.Generator().manual_seed(0))

    plain, memo = drawn(Loss()), drawn(presets.memo_stage2().loss)
    assert plain.max() < 1 and float((plain > 0.95).float().mean()) == pytest.approx(0.0016, abs=0.001)
    assert float((memo == 1).float().mean()) == pytest.approx(0.05, abs=0.005)
    assert float(memo[memo < 1].median()) == pytest.approx(2 / 3, abs=0.01), "shifted by the odds 2 to 1"
    assert torch.equal(plain, drawn(Loss(pure_noise=0.0))), "older settings draw what they drew"
    for preset in (presets.memo_stage2, presets.memo_stage3, presets.memo_lora):
        assert preset().data.start_ratio > 0 and preset().data.past_noise > 0 and preset().data.by_length


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve random clips of six videos, at 25 frames a second."""
    folder = tmp_path_factory.mktemp("videos")
    torch.manual_seed(0)
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for number in range(12):
            tensors = {
                "latents": torch.randn(48, 4, SIZE, SIZE).half(),
                "speech": torch.randn(48, sizes.SPEECH_LAYERS, sizes.SPEECH_DIM).half(),
                "emotion": torch.full((48,), number % 9, dtype=torch.uint8),
            }
            about = {"video": f"video{number // 2}", "crop_scale": 1.3, "encoded_fps": 25.0}
            writer.add(f"clip{number}", tensors, about)
    return folder


HELD = replace(
    TINY,
    steps=4,
    data=Data(held_out=0.3, by_length=True),
    engine=replace(TINY.engine, sample_every=2, validated=3),
)


def validation_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]


def test_validation_is_the_same_stopped_or_not_and_changes_nothing(videos: Path, tmp_path: Path) -> None:
    whole = engine.train(HELD, videos, tmp_path / "whole", small_nets(), None)
    rows = validation_of(tmp_path / "whole")
    levels = {f"validation_{level}" for level in (0.1, 0.3, 0.5, 0.7, 0.9)}
    assert [row["step"] for row in rows] == [2, 4] and rows[0].keys() == {"step", "data", "validation"} | levels
    assert {row["data"] for row in rows} == {Shards(videos).digest}
    assert rows[0]["validation"] != rows[1]["validation"]
    blind = replace(HELD, engine=replace(HELD.engine, validated=0))
    assert_same_state(whole, engine.train(blind, videos, tmp_path / "blind", small_nets(), None))

    with stopped_at(3):
        engine.train(HELD, videos, tmp_path / "halved", small_nets(), None)
    (tmp_path / "halved" / "validation.jsonl").open("a").write('{"step": 3, "validation": 1}\n')  # is done again
    assert_same_state(whole, engine.train(HELD, videos, tmp_path / "halved", small_nets(), None))
    assert validation_of(tmp_path / "halved") == rows


@pytest.mark.parametrize("fails", ["engine.validate", "preview.picture"])
def test_what_fails_while_a_run_looks_at_itself_costs_no_step_and_is_made_up_for(
    videos: Path, encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """The checkpoint comes first; going on from it validates and shows what is missing, and nothing twice."""
    stage = replace(HELD, engine=replace(HELD.engine, samples=1, guidance=3.5))
    whole, out = engine.train(stage, videos, tmp_path / "whole", small_nets(), encoders), tmp_path / "failed"

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(f"training.{fails}", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.train(stage, videos, out, small_nets(), encoders)
    assert [path.name for path in engine.checkpoints(out)] == ["checkpoint-0000002"]
    assert_same_state(whole, engine.train(stage, videos, out, small_nets(), encoders))
    assert validation_of(out) == validation_of(tmp_path / "whole") and len(log_of(out)) == 4
    shown = [{path.name: path.read_bytes() for path in (run / "samples").iterdir()} for run in (whole.parent, out)]
    assert shown[0].keys() == {"0000002.png", "0000004.png"} and shown[0] == shown[1]
    monkeypatch.setattr(f"training.{fails}", fail)
    engine.train(stage, videos, out, small_nets(), encoders)  # finished: nothing is left to look at


@pytest.mark.parametrize("again", [False, True])
def test_looking_draws_no_random_number_of_the_run(
    videos: Path, encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Of which dropout takes some; libraries that load an autoencoder may begin with random weights."""
    picture = preview.picture
    monkeypatch.setattr(preview, "picture", lambda *all_of_it: (torch.rand(1), picture(*all_of_it))[1])
    drawn, look = [], engine.Trainer._look

    def watched(trainer: engine.Trainer, *_: Any) -> None:
        before = torch.get_rng_state()
        look(trainer, again)
        drawn.append(torch.equal(before, torch.get_rng_state()))

    monkeypatch.setattr(engine.Trainer, "_look", watched)
    stage = replace(HELD, steps=1, engine=replace(HELD.engine, samples=1))
    engine.train(stage, videos, tmp_path, small_nets(), encoders)
    assert drawn == [True] and (tmp_path / "samples").is_dir()


def test_processes_share_the_validation(videos: Path) -> None:
    data = batches.HeldOut(batches.TrainingSet(videos, HELD))
    model = flow.FlowModel(small_nets(), Loss()).eval()

    def sums(rank: int, processes: int) -> tuple[dict[str, float], torch.Tensor]:
        seen: list[torch.Tensor] = []
        one = SimpleNamespace(
            device=torch.device("cpu"),
            num_processes=processes,
            process_index=rank,
            reduce=lambda value, _: seen.append(value) or value,
        )
        return validate(model, data, 3, one), seen[0]

    alone = sums(0, 1)
    halves = sums(0, 2)[1] + sums(1, 2)[1]
    torch.testing.assert_close(alone[1], halves)
    assert alone[0]["validation_0.5"] == pytest.approx(float(halves[2, 0] / halves[2, 1]))


def test_pictures_show_what_is_held_out_with_guidance(
    videos: Path,
    encoders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[str] = []
    conditions_of = preview.conditions_of

    def watched(nets: Any, batch: batches.Batch, guided: bool) -> Any:
        assert guided
        shown.extend(batch.keys)
        return conditions_of(nets, batch, guided)

    monkeypatch.setattr(preview, "conditions_of", watched)
    stage = replace(HELD, steps=1, engine=replace(HELD.engine, guidance=3.5, samples=2, validated=0))
    engine.train(stage, videos, tmp_path, small_nets(), encoders)
    data = batches.TrainingSet(videos, stage)
    assert set(shown) <= keys(data.shards, data.held_out) and len(shown) == 2
    assert (tmp_path / "samples" / "0000001.png").is_file()


def test_guided_pictures_are_made_as_sampling_makes_them(videos: Path) -> None:
    """With rows of face tokens as checkpoints of training ask for, and not with the released ones."""
    nets, noise = small_nets().eval(), torch.randn(1, 4, 16, SIZE, SIZE)
    nets.device, nets.digest = torch.device("cpu"), "model"
    sample = batches.HeldOut(batches.TrainingSet(videos, HELD))[0]
    batch = replace(sample, face_embedding=torch.randn(1, 512))
    reference = Reference(torch.zeros(3, 64, 64), batch.portrait, batch.face_embedding, None)
    memory = MemoryState.empty().push(batch.past[0], batch.face_embedding, "model", reference.digest)
    inputs = WindowInputs(start=0, frames=16, audio=batch.audio[0], emotion=batch.emotion, noise=None, memory=memory)
    made = {}
    with torch.no_grad():
        for rows in ("grouped", "released"):
            settings = Settings(steps=2, guidance_scale=3.5, face_token_rows=rows)
            conditioner = Conditioner(nets, reference, settings, MemoryCache())
            shown = conditioner.conditions(inputs), conditioner.memory(memory)
            made[rows] = sample_window(nets, noise, *shown, settings)
        picture = sample_window(nets, noise, *preview.conditions_of(nets, batch, True), settings)
    assert relative_l2(picture, made["grouped"]) < 1e-4 < relative_l2(picture, made["released"])


def test_a_checkpoint_says_how_it_is_to_be_sampled(videos: Path, encoders: Path, tmp_path: Path) -> None:
    last = engine.train(replace(HELD, steps=1), videos, tmp_path, small_nets(), encoders)
    said = json.loads((last / "diffusion_net" / "config.json").read_text())
    assert said["face_token_rows"] == "grouped" and said["crop_margin"] == pytest.approx(0.15)
    made = MemoPipeline.from_pretrained(last)
    assert made.crop_margin == pytest.approx(0.15) and made.nets.fps == said["fps"] == 25
    audio = made.encode_audio(torch.randn(8000), 16000)
    assert made.job(made.encode_reference(torch.zeros(3, 64, 64)), audio).settings.face_token_rows == "grouped"


def test_an_adapter_says_how_it_is_to_be_sampled(videos: Path, encoders: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    start, out = tmp_path / "start", tmp_path / "run"
    small_nets().save(start)
    config = json.loads((start / "diffusion_net" / "config.json").read_text())
    del config["face_token_rows"]  # as the released one
    (start / "diffusion_net" / "config.json").write_text(json.dumps(config))
    link_encoders(encoders, start)
    settings = ["steps=1", "optimizer.bits=32", "data.workers=0", "lora.rank=2", "engine.samples=1"]
    command.main(
        ["train", "memo_lora", "--data", str(videos), "--out", str(out), "--start", str(start), "--set", *settings]
    )
    file = engine.latest(out) / "adapter.safetensors"
    plain, adapted = (MemoPipeline.from_pretrained(start, lora=lora) for lora in ([], [file]))
    assert (plain.nets.fps, plain.crop_margin) == (30, 0.35)
    assert adapted.nets.fps == 25 and adapted.crop_margin == pytest.approx(0.15)
    rows = [Settings().for_checkpoint(made.nets.diffusion_net.config).face_token_rows for made in (plain, adapted)]
    assert rows == ["released", "grouped"]


def test_a_portrait_is_cut_as_the_clips_were() -> None:
    """The square of a clip in sides of the face that its pictures show; back from the checkpoint's margin to pixels."""
    looks = [[0.2 * n, 400.0 + n, 400.0, 500.0 + n, 480.0] for n in range(5)]  # 100 x 80 pixels, moving
    row = Row(id="a-0-1", source="a.mp4", identity="a", box=[380.0, 375.0, 510.0, 505.0], looks=looks)
    assert crop_scale(row.box, row.looks) == pytest.approx(1.3) and crop_scale(row.box, None) is None
    nets = small_nets()
    nets.crop_to(crop_scale(row.box, row.looks))
    margin = nets.sizes.diffusion_net["crop_margin"]
    left, top, right, bottom = crop_region(1000, 1000, 64, 64, (400.0, 400.0, 500.0, 480.0), margin)
    assert right - left == bottom - top == 130


def test_networks_of_another_window_are_trained_and_counted_by_theirs(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twelve = replace(SIZES, diffusion_net=SIZES.diffusion_net | {"window_frames": 12, "fps": 25})
    stage = replace(TINY, steps=1, data=Data(past_windows=(2,)))
    batch = budget.example(stage, twelve, 64)
    assert batch.latents.shape[2] == batch.audio.shape[1] == 12 and batch.past.shape[1] == 24
    assert budget.storage(1, 64, twelve) < 0.9 * budget.storage(1, 64, SIZES)
    seen, forward = [], flow.FlowModel.forward
    monkeypatch.setattr(
        flow.FlowModel, "forward", lambda model, batch: seen.append(batch.latents.shape[2]) or forward(model, batch)
    )
    last = engine.train(stage, videos, tmp_path, Nets(twelve), None)
    assert Nets.from_pretrained(last).window == 12 and seen == [12]


def test_other_data_are_gone_on_with_on_purpose(videos: Path, tmp_path: Path) -> None:
    out, stage = tmp_path / "run", replace(HELD, steps=2)
    engine.train(stage, videos, out, small_nets(), None)
    more, old = tmp_path / "more", Shards(videos)
    with ShardWriter(more) as writer:
        for number, sample in enumerate([*old.samples, *old.samples[:4]]):
            tensors = {name: old.read(number % 12, name) for name in old.names(number % 12)}
            writer.add(sample.key if number < 12 else f"new{number}", tensors, {"video": sample.video})
    longer = replace(stage, steps=4)
    with pytest.raises(engine.ConfigError, match="the data was .*--new-data goes on"):
        engine.train(longer, more, out, small_nets(), None)
    last = engine.train(longer, more, out, small_nets(), None, new_data=True)
    record = engine.begun(last)[1]
    assert record["history"] == [{"step": 2, "data": old.digest}] and record["data"] == Shards(more).digest
    first = batches.TrainingSet(videos, stage)
    assert engine.learned_before(out, more) == keys(old, first.usable) and first.held_out, "not held out from now on"
    assert [row["data"] for row in validation_of(out)] == [old.digest, Shards(more).digest]
    steps = torch.load(last / "state" / "optimizer.bin", weights_only=True)["state"].values()
    assert {int(state["step"]) for state in steps} == {4}, "the optimiser goes on"
    assert [row["step"] for row in log_of(out)] == [1, 2, 3, 4]

    # Their first epoch begins where they came; and the run is now one with these data, without being told again.
    seen: list[str] = []
    plain = batches.TrainingSet.__getitem__

    def watched(data: batches.TrainingSet, number: int) -> batches.Batch:
        sample = plain(data, number)
        seen.extend(sample.keys)
        return sample

    data = batches.TrainingSet(more, longer)
    epoch = len(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches.TrainingSet, "__getitem__", watched)
        engine.train(replace(longer, steps=2 + epoch // 2), more, out, small_nets(), None)
    first = batches.TrainingSet(more, longer)
    first.first = 4
    drawn = Counter([key for number in range(4, 8) for key in first[number].keys] + seen[: epoch - 4])
    assert drawn == Counter({first.shards.samples[n].key: 3 for n in first.usable}), "each stretch of each clip, once"


def test_a_run_of_an_earlier_version_goes_on_as_it_was(videos: Path, encoders: Path, tmp_path: Path) -> None:
    small_nets().save(tmp_path / "start")
    settings = ["engine.mixed_precision=no", "optimizer.batch=1", "engine.save_every=1", "data.workers=0"]
    settings += ["engine.sample_every=9", "steps=1"]
    earlier = ["data.start_ratio=0", "data.past_noise=0", "data.by_length=false", "data.held_out=0"]
    earlier += ["loss.logit_mean=0", "loss.pure_noise=0", "data.portrait_outside=false"]
    out = tmp_path / "run"

    def train(*changes: str) -> None:
        paths = ["--data", str(videos), "--out", str(out), "--start", str(tmp_path / "start")]
        command.main(["train", "memo_stage2", *paths, "--set", *settings, *changes])

    train(*earlier)
    before, record = engine.begun(engine.latest(out))
    told = json.loads(config.to_json(before))
    del record["history"], told["data"]["portrait_outside"]  # which it had not
    (engine.latest(out) / "training.json").write_text(json.dumps(record))
    (engine.latest(out) / "config.json").write_text(json.dumps(told))
    train("steps=2")
    kept, record = engine.begun(engine.latest(out))
    assert record["step"] == 2 and record["history"] == [] and kept == replace(before, steps=2)
    with pytest.raises(SystemExit, match="data.start_ratio was 0.0, is 0.9"):
        train("steps=3", "data.start_ratio=0.9")
