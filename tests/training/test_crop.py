"""What makes measures comparable: one rate, clips drawn from a video, real pictures cropped like the generated ones."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from made_videos import SIZE, plain, talk, write_video
from torch import Tensor, nn

from memo_core.encoders.face import Face
from memo_core.errors import VideoError
from memo_core.inputs.portrait import prepare_portrait
from training import media
from training.evaluation import add_commands, evaluate
from training.evaluation.crop import Crop, matching_crop, portrait_crop
from training.evaluation.faces import FaceTrack, FaceTracks
from training.evaluation.frechet import Sample
from training.evaluation.metric import I3D, Tools
from training.evaluation.report import write_report
from training.evaluation.videos import Pair, PairReader, frames_at, pair_videos

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
CPU = torch.device("cpu")


class Spotter:
    """In the face models' place: the face is the green rectangle."""

    def detect(self, image: np.ndarray) -> list[Face]:
        rows, columns = np.nonzero((image[..., 1] > 150) & (image[..., 0] < 90) & (image[..., 2] < 90))
        if not len(rows):
            return []
        left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        x, y = (left + right) / 2, (top + bottom) / 2
        points = [(left, top), (right, top), (x, y), (left, bottom), (right, bottom)]
        return [Face((left, top, right, bottom), np.array(points, np.float32), 1.0)]


def scene(shift: int, height: int = 200, width: int = 240) -> np.ndarray:
    """A wavy picture with a green rectangle."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + y / 13), np.cos(x / 17 - y / 11), np.sin(x / 7) * np.cos(y / 8)], -1)
    picture = (128 + 60 * waves * [1, 0.3, 1]).astype(np.uint8)
    picture[60:120, 80 + shift : 130 + shift] = (20, 230, 20)
    return picture


@pytest.fixture
def spotting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tools, "analyzer", Spotter())


@pytest.fixture
def cropped(tmp_path: Path) -> tuple[Path, Path, Crop]:
    """A video of a part of another one, as large as `memo generate` would make it: both, and the part."""
    frames = [scene(shift) for shift in range(8)]
    crop = portrait_crop(frames[0], Spotter().detect(frames[0])[0], 128, 128)
    made = write_video(tmp_path / "made.mp4", [crop.cut(frame) for frame in frames])
    return made, write_video(tmp_path / "true.mp4", frames), crop


def test_real_pictures_are_cropped_like_the_generated_ones(
    cropped: tuple[Path, Path, Crop], spotting: None, tmp_path: Path
) -> None:
    """Both rules find the part; nothing but it then stands between the videos and equality, codec apart."""
    made, true, crop = cropped
    portrait = evaluate(made, true, ["psnr"], crop="portrait")
    assert portrait.totals["psnr"].value > 30 and portrait.videos[0].sizes == ((128, 128), (128, 128))
    assert str(crop) in portrait.videos[0].note and "240x200" in portrait.videos[0].note
    assert evaluate(made, true, ["psnr"], crop="match").totals["psnr"].value > 26
    assert "aspect" in evaluate(made, true, ["psnr"]).totals["psnr"].note
    write_report(portrait, tmp_path / "report")
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["settings"]["crop"] == "portrait" and "portrait" in report["remarks"][0]


def test_the_portrait_rule_is_that_of_memo_generate() -> None:
    first = scene(30)
    prepared = prepare_portrait(first, (64, 128), analyzer=None, face_box=Spotter().detect(first)[0].box)
    crop = portrait_crop(first, Spotter().detect(first)[0], 128, 64)
    assert crop.box == prepared.crop
    ours = crop.cut(first).astype(float)
    assert np.abs(ours - (prepared.pixels.permute(1, 2, 0).numpy() + 1) * 127.5).mean() < 1
    assert portrait_crop(first, None, 64, 64).box == (20, 0, 220, 200)


def test_the_portrait_rule_leaves_the_checkpoints_margin(spotting: None, tmp_path: Path) -> None:
    frames = [scene(shift) for shift in range(4)]
    crop = portrait_crop(frames[0], Spotter().detect(frames[0])[0], 128, 128, margin=0.05)
    made = write_video(tmp_path / "made.mp4", [crop.cut(frame) for frame in frames])
    true = write_video(tmp_path / "true.mp4", frames)
    found = evaluate(made, true, ["psnr"], crop="portrait", margin=0.05)
    assert found.totals["psnr"].value > 25 > evaluate(made, true, ["psnr"], crop="portrait").totals["psnr"].value
    assert found.settings["margin"] == 0.05 and "margin 0.05" in found.remarks[0]
    run_command("evaluate", made, true, "--metrics", "psnr", "--crop", "portrait", "--margin", 0.05, "--out", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["measures"]["psnr"]["value"] == found.totals["psnr"].value
    run_command("crop", made, true, tmp_path / "cut", "--rule", "portrait", "--margin", 0.05)
    assert (next(frames_at(tmp_path / "cut/made.mkv", 25)) == crop.cut(next(frames_at(true, 25)))).all()


def test_a_match_keeps_the_face_where_it_is() -> None:
    """Also beyond the picture; faces without extent are refused."""
    face = Spotter().detect(scene(0))[0]
    wanted = Crop(50.5, -20.25, 170.5, 139.75, 96, 128)
    seen = Face(face.box, wanted.points(face.keypoints).astype(np.float32), 1.0)
    found = matching_crop(seen, face, 96, 128)
    np.testing.assert_allclose(found.box, wanted.box, atol=1e-4)
    assert found.cut(scene(0)).shape == (128, 96, 3)
    flat = Face(face.box, np.zeros((5, 2), np.float32), 1.0)
    with pytest.raises(VideoError, match="do not lie alike"):
        matching_crop(flat, face, 96, 128)


def test_faces_are_told_in_pixels_of_the_part() -> None:
    track = FaceTrack(np.array([0.0]), np.array([[20.0, 30, 40, 70]]), np.full((1, 5, 2), 30.0), np.array([True]))
    inside = track.inside(Crop(10, 20, 60, 120, 100, 100)).at(0.0)
    assert inside.box == (20, 10, 60, 50) and inside.keypoints[0].tolist() == [40, 10]


def test_both_faces_of_a_cropped_pair_lie_alike(cropped: tuple[Path, Path, Crop]) -> None:
    made, true, crop = cropped
    ours, theirs = FaceTracks(Spotter()).of_pair(Pair("a", made, true, crop=crop))
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=3)
    assert ours.boxes[0, 2] - ours.boxes[0, 0] > 60  # 50 in the whole picture


def test_a_video_without_a_face_to_crop_by_costs_its_row(spotting: None, tmp_path: Path) -> None:
    made = write_video(tmp_path / "made.mp4", plain(0, 0, 0, count=3))
    true = write_video(tmp_path / "true.mp4", [scene(0)] * 3)
    (row,) = evaluate(made, true, ["psnr"], crop="match").videos
    assert "no face was found in the first 25 pictures of made.mp4" in row.reason
    (row,) = evaluate(true, made, ["psnr"], crop="portrait").videos
    assert "no face was found in the first picture of made.mp4" in row.reason


def test_pictures_of_two_sizes_are_told_in_the_report(tmp_path: Path) -> None:
    made = write_video(tmp_path / "made.mp4", plain(9, 9, 9, count=3, size=64))
    true = write_video(tmp_path / "true.mp4", plain(9, 9, 9, count=3))
    found = evaluate(made, true, ["psnr"])
    write_report(found, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "In 1 of 1 videos" in text and "64x64 and 128x128" in text
    assert evaluate(true, true, ["psnr"]).remarks == []


def test_both_sides_are_read_at_one_rate(tmp_path: Path) -> None:
    """At 25 a real video of 25 frames a second shows each once; at the generated one's 30 some stand twice."""
    levels = range(20, 220, 8)
    true = write_video(tmp_path / "true.mp4", [plain(i, i, i, count=1, size=64)[0] for i in levels], fps=25)
    made = write_video(tmp_path / "made.mp4", plain(50, 50, 50, count=30, size=64), fps=30)

    def shown(fps: float | None) -> list[int]:
        chunks = PairReader(made, true, CPU, fps).chunks()
        return [round((float(frame.float().mean()) - 20) / 8) for chunk in chunks for frame in chunk.real]

    assert len(shown(25)) == len(set(shown(25))) == 25
    assert len(shown(None)) == 30 and len(set(shown(None))) == 25
    found = evaluate(made, true, ["psnr"], fps=25)
    (row,) = found.videos
    assert (row.frames, row.fps) == (25, 25) and "30 and 25 fps, compared at 25" in row.note
    assert "25 frames a second" in found.remarks[0]
    with pytest.raises(ValueError, match="fps is 0"):
        evaluate(made, true, ["psnr"], fps=0)


class MeanColour(nn.Module):
    """I3D's signature; the mean colour in place of its features."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        return x.mean(dim=[2, 3, 4])


def test_fvd_takes_so_many_clips_of_a_video_the_same_on_both_sides(tmp_path: Path) -> None:
    torch.jit.script(MeanColour()).save(str(tmp_path / I3D))
    for folder in ("made", "true"):
        for name in "abc":
            frames = [frame for level in (20, 90, 160, 230) for frame in plain(level, ord(name), 60, size=32)]
            write_video(tmp_path / folder / f"{name}.mp4", frames)
    sides = tmp_path / "made", tmp_path / "true"
    whole = evaluate(*sides, ["fvd"], tmp_path)
    assert whole.totals["fvd"].note.startswith("12 and 12 clips")
    for count in (1, 2):
        drawn = evaluate(*sides, ["fvd"], tmp_path, clips_per_video=count)
        assert drawn.totals["fvd"].note.startswith(f"{3 * count} and {3 * count} clips")
        assert drawn.totals["fvd"].value == pytest.approx(0, abs=1e-6)
        assert f"{count} clips of a video" in drawn.remarks[0]
    with pytest.raises(ValueError, match="clips_per_video is 0"):
        evaluate(*sides, ["fvd"], tmp_path, clips_per_video=0)


def test_every_clip_is_drawn_as_often() -> None:
    counts: Counter[int] = Counter()
    for seed in range(3000):
        sample, kept = Sample(2, str(seed)), {}
        for item in range(5):
            place = sample.place()
            if place is not None:
                kept[place] = item
        counts.update(kept.values())
    assert set(counts) == set(range(5)) and all(abs(count / 3000 - 2 / 5) < 0.04 for count in counts.values())


def run_command(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args([*map(str, arguments)])
    args.run(args)


def test_cropped_files_for_other_programs(spotting: None, tmp_path: Path) -> None:
    """Videos without loss, in step with their sound; pictures of both sides."""
    made, true = tmp_path / "made", tmp_path / "true"
    frames = [scene(shift) for shift in range(6)]
    sound = np.sin(np.arange(16000 * 6 // 25) / 20).astype(np.float32) / 2
    for name in ("a", "deep/b"):
        write_video(true / f"{name}.mp4", frames, sound=sound)
        write_video(made / f"{name}.mp4", [portrait_crop(f, None, 96, 96).cut(f) for f in frames])
    run_command("crop", made, true, tmp_path / "out", "--rule", "portrait")
    (one, _) = pair_videos(tmp_path / "out", true)
    face = Spotter().detect(next(frames_at(true / "a.mp4", 25)))[0]
    crop = portrait_crop(frames[0], face, 96, 96)
    for ours, whole in zip(frames_at(one.generated, 25), frames_at(true / "a.mp4", 25), strict=True):
        assert (ours == crop.cut(whole)).all()
    copied, _ = media.sound(one.generated, 0, 0.24, 48000)
    original, _ = media.sound(true / "a.mp4", 0, 0.24, 48000)  # VideoWriter makes it 48 kHz
    np.testing.assert_allclose(copied, original, atol=1e-3)

    before = one.generated.stat().st_mtime_ns
    run_command("crop", made, true, tmp_path / "out", "--rule", "portrait")
    assert one.generated.stat().st_mtime_ns == before
    run_command("crop", made, true, tmp_path / "pictures", "--pictures", "--every", "2")
    names = [f"{name}-0000{i}.png" for name in ("a", "deep-b") for i in (0, 2, 4)]
    for side in ("generated", "real"):
        assert sorted(path.name for path in (tmp_path / "pictures" / side).iterdir()) == names

    write_video(made / "dark.mp4", plain(0, 0, 0, count=2))
    write_video(true / "dark.mp4", plain(0, 0, 0, count=2))
    with pytest.raises(SystemExit, match=r"1 videos were not cropped\ndark: no face"):
        run_command("crop", made, true, tmp_path / "out")


def test_a_crop_without_face_models_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    made = talk(tmp_path / "a.mp4", 1, 0.2, SIZE)
    options = ("--weights", tmp_path, "--metrics", "psnr", "--out", tmp_path / "out", "--crop", "match")
    with pytest.raises(SystemExit, match="missing: scrfd_10g_bnkps.onnx"):
        run_command("evaluate", made, made, *options)
