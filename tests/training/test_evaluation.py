"""Measures of generated videos: closed-form cases, networks of the published formats, reports, and hostile files."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import ROOT
from made_videos import SIZE, plain, talk, write_video
from torch import Tensor, nn

from memo_core.checkpoint.download import RELEASE_FILES
from memo_core.errors import CheckpointError, VideoError
from training.evaluation import add_command, evaluate
from training.evaluation.faces import FaceTrack
from training.evaluation.frechet import FACE_3D_SIZE, Fid, Fvd, Moments, align_3d, frechet_distance, load_inception
from training.evaluation.landmarks import head_angles, landmark_distance
from training.evaluation.metric import ALEXNET, FACE_3D_POINTS, I3D, INCEPTION, SOURCES, Tools
from training.evaluation.pictures import Lpips, Psnr, Ssim
from training.evaluation.report import table, write_report
from training.evaluation.sync import Sync, score_video
from training.evaluation.videos import CHUNK_PIXELS, Chunk, Pair, PairReader, frames_at, pair_videos
from training.syncnet import SyncNet, cut

onnx = pytest.importorskip("onnx", reason="the onnx package, which builds the test models, is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

BOX = (30.0, 30.0, 98.0, 110.0)  # where the test detector sees a face
MOVES = np.zeros(106)
MOVES[52:72:2] = 1  # of the mouth, points 52 to 71, every second one
MOVES[[51, 72]] = 3  # their neighbours, which are not the mouth's
KEYPOINTS = ((48, 62), (80, 62), (64, 78), (52, 92), (76, 92))


# --- Networks of the published signatures -------------------------------------------------------------------------


def save_onnx(path: Path, nodes: list, values: dict[str, np.ndarray], shape: list, outputs: dict[str, list]) -> None:
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


def save_detector(path: Path) -> None:
    """SCRFD's nine outputs; one face at BOX of a 128x128 picture, unless the picture is black."""
    from onnx import helper

    scale, stride = 640 / SIZE, 32
    cells = 640 // stride
    index = 2 * (10 * cells + 10)  # the anchor at column and row 10
    x = y = 10 * stride
    values, outputs = {}, {}
    for name, width in (("score", 1), ("box", 4), ("points", 10)):
        for level in (8, 16, 32):
            values[f"{name}{level}"] = np.zeros((2 * (640 // level) ** 2, width), np.float32)
            outputs[f"{name}{level}_out"] = [None, width]
    values["score32"][index] = 1
    left, top, right, bottom = (scale * side for side in BOX)
    values["box32"][index] = np.array([x - left, y - top, right - x, bottom - y]) / stride
    values["points32"][index] = ((scale * np.array(KEYPOINTS) - (x, y)) / stride).ravel()
    values |= {"gain": np.float32(1e6), "dark": np.float32(0.98)}
    nodes = [
        helper.make_node("ReduceMean", ["input.1"], ["mean"], keepdims=0),  # (x - 127.5) / 128: black is -0.996
        helper.make_node("Add", ["mean", "dark"], ["light"]),
        helper.make_node("Mul", ["light", "gain"], ["strong"]),
        helper.make_node("Sigmoid", ["strong"], ["seen"]),
    ]
    nodes += [helper.make_node("Mul", [name, "seen"], [f"{name}_out"]) for name in values if f"{name}_out" in outputs]
    save_onnx(path, nodes, values, [1, 3, "height", "width"], outputs)


def save_linear(path: Path, size: int, weight: np.ndarray, bias: np.ndarray) -> None:
    """Something linear in the mean red, green and blue of the picture: [N, 3, size, size] -> [N, K]."""
    from onnx import helper

    nodes = [
        helper.make_node("GlobalAveragePool", ["input.1"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["values"], transB=1),
    ]
    values = {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}
    save_onnx(path, nodes, values, ["n", 3, size, size], {"values": ["n", len(bias)]})


class MeanColour(nn.Module):
    """I3D's signature; the mean colour in place of its features."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert rescale and resize and return_features and x.shape[2] == 16
        return x.mean(dim=[2, 3, 4])


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file but those of torchvision's and torch-fidelity's networks; the face models as MEMO releases them."""
    from scipy.io import savemat

    folder = tmp_path_factory.mktemp("weights")
    faces = folder / "misc/face_analysis/models"
    faces.mkdir(parents=True)
    rng = np.random.default_rng(0)
    save_detector(faces / "scrfd_10g_bnkps.onnx")
    save_linear(faces / "glintr100.onnx", 112, rng.normal(size=(512, 3)), np.zeros(512))
    # Points go right by 1/255 of half the picture, or a multiple of it, for each level of red.
    weight = np.zeros((106, 2, 3))
    weight[:, 0, 0] = MOVES / 255
    save_linear(faces / "2d106det.onnx", 192, weight.reshape(212, 3), rng.uniform(-0.5, 0.5, 212))
    head = rng.uniform(-0.5, 0.5, (1103, 3))
    turn = np.cross([0, 1, 0], head)  # a small turn about y for each level of red
    save_linear(faces / "1k3d68.onnx", 192, np.pad(turn.reshape(-1, 1) / 2550, ((0, 0), (0, 2))), head.ravel())
    save_linear(folder / "deep3d.onnx", 224, rng.normal(size=(257, 3)), np.zeros(257))
    savemat(folder / FACE_3D_POINTS, {"lm": rng.uniform(-1, 1, (68, 3))})
    torch.save(SyncNet.random().state_dict(), folder / "syncnet_v2.model")
    torch.jit.script(MeanColour()).save(str(folder / I3D))
    return folder


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine may have fetched before does not count."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


# --- Closed forms -------------------------------------------------------------------------------------------------


def exact_samples(mean: np.ndarray, covariance: np.ndarray, count: int = 400) -> np.ndarray:
    """Samples whose mean and covariance are exactly these."""
    white = np.random.default_rng(0).normal(size=(count, len(mean)))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    return mean + white @ np.linalg.cholesky(covariance).T


def test_frechet_distance_of_two_gaussians() -> None:
    """With diagonal covariances it is |m|^2 + sum (sqrt a - sqrt b)^2; otherwise compare with scipy's matrix root."""
    from scipy.linalg import sqrtm

    mean, ours, theirs = np.array([1.0, -2.0, 0.5]), np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 0.25])
    a, b = exact_samples(np.zeros(3), ours), exact_samples(mean, theirs)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(5.25 + 1 + 0 + 6.25, rel=1e-9)

    mix = np.random.default_rng(1).normal(size=(3, 3))
    tilted = mix @ mix.T + np.eye(3)
    expected = mean @ mean + np.trace(ours) + np.trace(tilted) - 2 * np.trace(sqrtm(ours @ tilted)).real
    found = frechet_distance(Moments.of(a), Moments.of(exact_samples(mean, tilted)))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_fewer_samples_than_dimensions() -> None:
    samples = np.random.default_rng(0).normal(size=(12, 300))
    moments = Moments.of(samples)
    assert 0 <= frechet_distance(moments, moments) < 1e-4 * 300
    assert frechet_distance(moments, Moments.of(samples + 1)) == pytest.approx(300, rel=1e-4)
    with pytest.raises(ValueError, match="needs 2"):
        frechet_distance(moments, Moments.of(samples[:1]))


def test_moments_in_parts_are_those_of_the_whole() -> None:
    samples = np.random.default_rng(0).normal(loc=1e4, size=(50, 4))
    parts = Moments.of(samples[:7]) + Moments.of(samples[7:8]) + Moments.of(samples[8:])
    np.testing.assert_allclose(parts.scatter / 49, np.cov(samples.T), rtol=1e-8)
    np.testing.assert_allclose(parts.mean, samples.mean(0))


def test_psnr_and_ssim_of_known_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(50, 200, (3, 3, 64, 64), dtype=torch.uint8, generator=generator)
    for metric, difference, expected in (
        (Psnr, 5, 20 * math.log10(255 / 5)),
        (Psnr, 0, 100.0),
        (Ssim, 0, 1.0),
    ):
        measured = metric(Tools())
        measured.start(None)
        measured.update(Chunk(real + difference, real, 0, 25))
        (reading,) = measured.finish().values()
        assert reading.value == pytest.approx(expected, rel=1e-4)
        assert len(reading.curve) == 3 and reading.times[2] == pytest.approx(2 / 25)


def test_landmark_distance_does_not_see_where_the_face_is() -> None:
    points = np.random.default_rng(0).uniform(0, 100, (20, 2))
    assert landmark_distance(points, points + (30, -7)) == pytest.approx(0, abs=1e-9)
    opened = points.copy()
    opened[:10, 1] += 6  # half of them down by 6: 3 down and 3 up from their mean
    assert landmark_distance(points, opened) == pytest.approx(3)


def test_head_angles_of_known_rotations() -> None:
    points = np.random.default_rng(0).normal(size=(21, 3))

    def turned(pitch: float, yaw: float, roll: float) -> np.ndarray:
        (a, b, c), (d, e, f) = np.cos(np.radians([pitch, yaw, roll])), np.sin(np.radians([pitch, yaw, roll]))
        about_x = np.array([[1, 0, 0], [0, a, -d], [0, d, a]])
        about_y = np.array([[b, 0, e], [0, 1, 0], [-e, 0, b]])
        about_z = np.array([[c, -f, 0], [f, c, 0], [0, 0, 1]])
        return 70 * points @ (about_z @ about_y @ about_x).T + 5

    angles = [(0, 0, 0), (10, -20, 5), (-3, 40, 15)]
    np.testing.assert_allclose(head_angles(np.array([turned(*a) for a in angles])), angles, atol=1e-9)


def test_the_face_for_expressions_is_centred_and_scaled() -> None:
    """The standard face's origin lands in the middle, one of its units is 102 pixels."""
    standard = np.array([[-0.3, 0.3, 0.1], [0.3, 0.3, 0.1], [0, 0, 0.4], [-0.25, -0.3, 0.2], [0.25, -0.3, 0.2]])
    frame = torch.zeros(3, 300, 400, dtype=torch.uint8)
    frame[:, 139:142, 219:222] = 255  # the origin, at x = 220, y = 140
    frame[:, 139:142, 259:262] = 255  # 0.8 units to its right
    keypoints = np.column_stack([220 + 50 * standard[:, 0], 140 - 50 * standard[:, 1]])
    picture = align_3d(frame, keypoints, standard)
    assert picture.shape == (1, 3, FACE_3D_SIZE, FACE_3D_SIZE)
    rows, columns = np.nonzero(picture[0, 0] > 0.5)
    near = columns < 150
    assert abs(columns[near].mean() - 112) < 3 and abs(rows[near].mean() - 112) < 3
    assert abs(columns[~near].mean() - columns[near].mean() - 0.8 * 102) < 2
    assert align_3d(frame, keypoints * 0, standard) is None


# --- Reading videos -----------------------------------------------------------------------------------------------


def test_another_rate_repeats_or_leaves_out_frames(tmp_path: Path) -> None:
    levels = range(20, 220, 20)
    path = write_video(tmp_path / "a.mp4", [plain(i, i, i, count=1)[0] for i in levels], fps=30)
    seen = [round(float(frame.mean()) / 20) * 20 for frame in frames_at(path, 15)]
    assert seen == list(levels)[::2]
    doubled = [float(frame.mean()) for frame in frames_at(path, 60)]
    assert np.abs(np.array(doubled) - np.arange(20, 220, 10)).max() < 13  # half a frame is a level of 10
    assert len(list(frames_at(path, 25))) == 8  # 10 frames at 30 fps last 8.3 of 25 fps


def test_chunks_stay_small_whatever_the_video(tmp_path: Path) -> None:
    big = write_video(tmp_path / "big.mp4", plain(9, 9, 9, count=12, size=1024))
    reader = PairReader(big, big, torch.device("cpu"))
    sizes = [chunk.generated.shape for chunk in reader.chunks()]
    assert sum(shape[0] for shape in sizes) == 12
    assert max(shape[0] * shape[2] * shape[3] for shape in sizes) <= CHUNK_PIXELS


def test_folders_are_paired_by_name(tmp_path: Path) -> None:
    for name in ("made/a.mp4", "made/deep/b.mp4", "made/c.mp4", "true/a.mov", "true/deep/b.mp4", "true/d.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "true/a.mkv").touch()
    pairs = {pair.name: pair for pair in pair_videos(tmp_path / "made", tmp_path / "true")}
    assert list(pairs) == ["a", "c", "d", "deep/b"]
    assert pairs["deep/b"].problem == "" and pairs["deep/b"].real == tmp_path / "true/deep/b.mp4"
    assert "a.mkv, a.mov" in pairs["a"].problem
    assert str(tmp_path / "true") in pairs["c"].problem and str(tmp_path / "made") in pairs["d"].problem
    with pytest.raises(VideoError, match="two files or two folders"):
        pair_videos(tmp_path / "made", tmp_path / "true/d.mp4")


def test_a_face_between_frames_that_were_looked_at() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 0, 0], [20, 0, 30, 10.0]])
    track = FaceTrack(np.array([0.0, 1.0, 2.0]), boxes, np.zeros((3, 5, 2)), np.array([True, False, True]))
    assert track.at(0.2).box == (2, 0, 12, 10)
    assert track.at(1.1) is None
    assert track.at(1.6).box == (16, 0, 26, 10) and track.at(9).box == (20, 0, 30, 10)
    assert track.looks.tolist() == [[0, 0, 0, 10, 10], [2, 20, 0, 30, 10]]


def test_cutting_beyond_the_frame_fills() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert (cut(image, (0, 0, 4, 4), 4) == image).all()
    part = cut(image, (2, 2, 6, 6), 4, fill=110)
    assert (part[:2, :2] == image[2:, 2:]).all() and (part[2:] == 110).all()


# --- Measuring ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """made/ and true/: a noisy copy of one talking head, and another of the right head cut short."""
    folder = tmp_path_factory.mktemp("talking")
    for seed in (1, 2):
        talk(folder / f"true/{seed}.mp4", seed)
        talk(folder / f"made/{seed}.mp4", seed, noise=6 * seed, count=None if seed == 1 else 20)
    return folder


def test_everything_at_once_on_talking_heads(talking: Path, weights: Path, tmp_path: Path) -> None:
    found = evaluate(talking / "made", talking / "true", weights=weights, every=6)
    absent = {"fid", "lpips"} & set(found.missing)
    assert set(found.missing) == absent
    for name, total in found.totals.items():
        if name not in absent:
            assert total.value is not None and np.isfinite(total.value), (name, total.note)
    one, two = found.videos
    assert (one.frames, two.frames) == (24, 20) and "first 20 of 24" in two.note
    assert one.readings["ssim"].value > two.readings["ssim"].value > 0.2  # the second is noisier
    assert one.readings["psnr"].value > two.readings["psnr"].value
    assert one.readings["f-sim"].value > 0.99 and len(one.readings["f-sim"].curve) == 4
    assert found.totals["sync-c"].real is not None and "after the sound" in one.readings["sync-c"].note
    assert "few for 64" in found.totals["e-fid"].note and found.totals["fvd"].note.startswith("2 and 2 clips")

    write_report(found, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["measures"]["ssim"]["value"] == pytest.approx(found.totals["ssim"].value)
    with (tmp_path / "videos.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["psnr"]) == pytest.approx(one.readings["psnr"].value) and rows[0]["sync-c_real"]
    text = (tmp_path / "report.md").read_text()
    assert table(found) in text and "Wang et al. 2004" in text
    pytest.importorskip("matplotlib")
    assert "(<curves/1.png>)" in text and (tmp_path / "curves/1.png").stat().st_size > 5000


def test_networks_see_the_right_colours_and_places(weights: Path, tmp_path: Path) -> None:
    """Plain red pictures: landmarks and features are linear in the level, so the answers are known."""
    made = write_video(tmp_path / "made.mp4", plain(180, 60, 60) + plain(140, 60, 60), sound=None)
    true = write_video(tmp_path / "true.mp4", plain(100, 60, 60, count=32))
    found = evaluate(made, true, ["m-lmd", "f-lmd", "fvd", "diversity", "f-sim"], weights, every=4)
    readings = found.videos[0].readings
    # The face's longer side is 80, the network sees 1.5 times that: half its picture is 60 pixels of 128, 120 of 256.
    # Half of the mouth's points move, so all lie half of it from their mean.
    for level, part in ((180, slice(0, 4)), (140, slice(4, 8))):
        assert readings["m-lmd"].curve[part].mean() == pytest.approx((level - 100) / 255 * 120 / 2, rel=0.06)
    assert readings["f-lmd"].value == pytest.approx(60 / 255 * 120 * abs(MOVES - MOVES.mean()).mean(), rel=0.06)
    # Features (180, 60, 60) and (140, 60, 60) against twice (100, 60, 60): mean apart by 60, variance 800.
    assert found.totals["fvd"].value == pytest.approx(60**2 + 800, rel=0.05)
    # 40 levels of red turn the head about y by 40 / 2550 rad, half the frames each.
    assert readings["diversity"].value == pytest.approx(math.degrees(40 / 2550) / 2 / 3, rel=0.1)
    assert readings["diversity"].real == pytest.approx(0, abs=1e-3)
    assert 0 < readings["f-sim"].value < 1


class Brightness:
    """In SyncNet's place: the face's brightness and the sound's loudness, on one scale."""

    def embed_faces(self, faces: Tensor) -> Tensor:
        assert faces.shape[1:] == (3, 224, 224)
        return faces[:-4].float().mean(dim=(1, 2, 3))[:, None] / 255

    def embed_sound(self, waveform: Tensor, count: int) -> Tensor:
        return waveform[: 640 * count].reshape(count, 640).square().mean(dim=1).mul(3).sqrt()[:, None] / 0.9


def write_timed(path: Path, frames: list[np.ndarray], times: list[float], sound: np.ndarray) -> Path:
    """A file whose frames have these times, in seconds, and whose sound begins at 0."""
    import av

    with av.open(str(path), "w") as file:
        picture, voice = file.add_stream("libx264", rate=25), file.add_stream("pcm_s16le", rate=16000, layout="mono")
        picture.height, picture.width = frames[0].shape[:2]
        picture.pix_fmt, picture.options = "yuv420p", {"preset": "ultrafast", "qp": "10"}
        picture.codec_context.time_base = Fraction(1, 1000)
        samples = av.AudioFrame.from_ndarray((sound * 32767).astype(np.int16)[None], format="s16", layout="mono")
        samples.sample_rate, samples.pts = 16000, 0
        file.mux(voice.encode(samples))
        file.mux(voice.encode(None))
        for frame, time in zip(frames, times, strict=True):
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            image.pts, image.time_base = round(time * 1000), Fraction(1, 1000)
            file.mux(picture.encode(image))
        file.mux(picture.encode(None))
    return path


def face_that_moves(late: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """60 frames at 25 fps of a square that is as bright as the sound, `late` frames before, was loud; it goes from left
    to right over a background that changes at random. The sound, and where a face was found: [K, 5]."""
    rng = np.random.default_rng(0)
    levels = rng.uniform(40, 220, 80)
    sound = (rng.uniform(-0.9, 0.9, (60, 640)) * levels[10:70, None] / 255).ravel().astype(np.float32)
    frames, looks = [], []
    for i in range(60):
        frame = np.full((SIZE, SIZE, 3), rng.uniform(0, 255), np.uint8)
        x = 8 + i
        frame[40:100, x : x + 50] = levels[10 - late + i]
        frames.append(frame)
        if i % 5 == 0:
            looks.append([i / 25, x + 14, 50, x + 34, 70])  # the network's square is 4 pixels more at each side
    return frames, sound, np.array(looks)


def track_of(looks: np.ndarray) -> FaceTrack:
    return FaceTrack(looks[:, 0], looks[:, 1:], np.zeros((len(looks), 5, 2)), np.ones(len(looks), bool))


@pytest.mark.parametrize("late", [3, 0, -5])
def test_a_video_whose_picture_is_shifted_against_its_sound(late: int, tmp_path: Path) -> None:
    """Streamed in chunks, cut out where the face is, at another rate; the data pipeline finds what evaluation finds."""
    from training.prepare import sync
    from training.prepare.rows import Row
    from training.prepare.settings import Settings

    frames, sound, looks = face_that_moves(late)
    path = write_video(tmp_path / "a.mp4", [frame for frame in frames for _ in range(2)], 50, sound)
    score = score_video(Brightness(), path, track_of(looks))
    assert score.offset == late and score.confidence > 0.1 and score.distance < 0.12

    row = Row(id="a", source="a.mp4", identity="a", start=0.0, end=2.4, looks=looks.tolist(), box=[0.0, 0, 128, 128])
    settings = Settings(raw=str(tmp_path), out=str(tmp_path), models="")
    (whole,) = sync.measure(row, settings, Brightness())
    assert (whole.sync_offset, whole.sync_confidence) == (late, round(score.confidence, 4))
    (part,) = sync.measure(replace(row, start=0.4, end=2.2), settings, Brightness())
    assert part.sync_offset == late and part.sync_confidence > 0.1


@pytest.mark.parametrize(
    "kept", [list(range(5, 60)), [i for i in range(60) if i < 20 or i % 3]], ids=["late", "uneven"]
)
def test_time_stamps_count_not_frames(kept: list[int], tmp_path: Path) -> None:
    """A picture that begins 0.2 s after the sound, and one whose rate changes, are in sync."""
    frames, sound, looks = face_that_moves(0)
    path = write_timed(tmp_path / "a.mkv", [frames[i] for i in kept], [i / 25 for i in kept], sound)
    score = score_video(Brightness(), path, track_of(looks))
    assert score.offset == 0 and score.confidence > 0.07
    shown = list(frames_at(path, 25))
    assert len(shown) == 60
    assert all(abs(float(shown[i].mean()) - float(frames[i].mean())) < 3 for i in kept)


def test_sync_looks_at_as_much_of_the_real_video_as_of_the_generated_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real video in sync for as long as the generated one lasts, and never after."""
    frames, sound, looks = face_that_moves(0)
    made = write_video(tmp_path / "made.mp4", frames[:30], 25, sound[: 30 * 640])
    true = write_video(tmp_path / "true.mp4", frames[:30] + frames[:30][::-1], 25, sound)
    monkeypatch.setattr(SyncNet, "load", lambda path: SimpleNamespace(to=lambda device: Brightness()))
    monkeypatch.setattr(Tools, "need", lambda tools, name: tmp_path)
    monkeypatch.setattr(Tools, "analyzer", None)
    monkeypatch.setattr(Tools, "tracks", SimpleNamespace(of=lambda path: track_of(looks)))
    metric = Sync(Tools())
    metric.start(Pair("a", made, true))
    found = metric.finish()["sync-d"]
    assert found.real == pytest.approx(found.value, abs=0.02)
    assert score_video(Brightness(), true, track_of(looks)).distance > found.value + 0.05
    with pytest.raises(VideoError, match="no face"):
        score_video(Brightness(), true, track_of(looks + [1.3, 0, 0, 0, 0]), 1.2)


def test_a_video_without_a_face_says_so(weights: Path, tmp_path: Path) -> None:
    dark = write_video(tmp_path / "dark.mp4", plain(0, 0, 0, count=8))
    light = write_video(tmp_path / "light.mp4", plain(99, 99, 99, count=8))
    names = ["f-sim", "m-lmd", "sync-c", "e-fid", "ssim"]
    found = evaluate(dark, light, names, weights)
    readings = found.videos[0].readings
    assert readings["f-sim"].value == 0 and "no face in 8 of 8" in readings["f-sim"].note
    assert readings["m-lmd"].value is None and "no face" in readings["m-lmd"].note
    assert "no audio" in readings["sync-c"].note and "no faces" in found.totals["e-fid"].note
    assert readings["ssim"].value is not None
    assert "no face" in evaluate(light, dark, ["f-sim"], weights).totals["f-sim"].note


def test_hostile_files_cost_one_row(talking: Path, tmp_path: Path) -> None:
    made, true = tmp_path / "made", tmp_path / "true"
    for name in ("good", "cut", "text", "lonely", "wide", "slow"):
        for folder in (made, true):
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.mp4").write_bytes((talking / folder.name / "1.mp4").read_bytes())
    (true / "lonely.mp4").unlink()
    whole = (made / "cut.mp4").read_bytes()
    (made / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (made / "text.mp4").write_text("this is no video")
    write_video(made / "wide.mp4", [np.zeros((64, 128, 3), np.uint8)] * 4)
    write_video(made / "slow.mp4", plain(1, 2, 3, count=3, size=64), fps=5)
    found = evaluate(made, true, ["ssim", "fvd"], None)
    rows = {row.name: row for row in found.videos}
    assert rows["good"].readings["ssim"].value > 0.5 and not rows["good"].reason
    assert "text.mp4" in rows["text"].reason and rows["cut"].reason
    assert "no such video" in rows["lonely"].reason
    assert "aspect" in rows["wide"].readings["ssim"].note
    assert rows["slow"].frames == 3 and "5 and 30 fps" in rows["slow"].note and "64x64" in rows["slow"].note
    assert found.totals["ssim"].videos == 2 and found.missing == ["fvd"]
    write_report(found, tmp_path / "report")
    assert "no such video" in (tmp_path / "report/videos.csv").read_text()


def test_a_name_that_is_no_text_is_reported_and_rows_are_on_disk_as_they_come(
    talking: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("made", "true"):
        (tmp_path / folder).mkdir()
        for name in ("\udcff1.mp4", "\udcff2.mp4"):
            os.link(talking / folder / "1.mp4", tmp_path / folder / name)
    run_command(tmp_path / "made", tmp_path / "true", "--out", tmp_path / "out", "--metrics", "psnr")
    assert "PSNR" in capsys.readouterr().out
    for name in ("report.md", "report.json", "videos.csv"):
        assert "\\udcff1" in (tmp_path / "out" / name).read_text("utf-8")

    seen = []

    def stop(self: Psnr, pair: object) -> None:
        seen.append(pair)
        if len(seen) == 2:
            raise KeyboardInterrupt
        self._times, self._values = [], []

    monkeypatch.setattr(Psnr, "start", stop)
    with pytest.raises(KeyboardInterrupt):
        run_command(tmp_path / "made", tmp_path / "true", "--out", tmp_path / "killed", "--metrics", "psnr")
    with (tmp_path / "killed/videos.csv").open() as file:
        assert [float(row["psnr"]) > 10 for row in csv.DictReader(file)] == [True]


# --- Files that are missing ---------------------------------------------------------------------------------------


def run_command(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers(required=True))
    args = parser.parse_args(["evaluate", *map(str, arguments)])
    args.run(args)


def test_what_is_missing_is_named_and_the_rest_is_measured(
    talking: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    videos = (talking / "made/1.mp4", talking / "true/1.mp4")
    common = ("--out", tmp_path / "out", "--weights", tmp_path / "nowhere")
    with pytest.raises(SystemExit) as exit:
        run_command(*videos, *common, "--metrics", "psnr,sync-c,fvd")
    assert exit.value.code == 1
    text = capsys.readouterr().out
    assert "missing: syncnet_v2.model, get it from http" in text and "missing: scrfd_10g_bnkps.onnx" in text
    assert "missing: i3d_torchscript.pt" in text
    assert "missing: syncnet_v2.model" in caplog.text  # said before work starts, too
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["measures"]["psnr"]["value"] > 10

    run_command(*videos, *common)  # nothing particular was asked for: missing ones are no failure
    run_command(*videos, *common, "--metrics", "psnr")
    with pytest.raises(SystemExit):
        run_command(*videos, *common, "--metrics", "beauty")
    assert "there is no beauty" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="device 'abacus' cannot be used"):
        run_command(*videos, *common, "--device", "abacus")
    with pytest.raises(SystemExit, match="does not exist"):
        run_command(tmp_path / "absent.mp4", videos[1], *common)


def test_remedies_are_true() -> None:
    """What `memo download` is said to fetch is on its list; packages are in the extra that is named."""
    import tomllib

    listed = {Path(file.target).name for file in RELEASE_FILES}
    for name, source in SOURCES.items():
        assert ("fetches it" in source) == (name in listed), name
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        lines = [line for metric in (Fid, Lpips, Ssim, Sync) for line in metric.missing(Tools()) if "package" in line]
    assert len(lines) == 6
    for line in lines:
        package, extra = re.search(r"the package (\S+), .*\[(\w+)\]", line).groups()
        package = "lpips" if package == "torchvision" else package  # which that brings
        assert any(item.startswith(package) for item in extras[extra]), line


def test_a_program_runs_only_from_a_folder_that_was_named(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "hub/checkpoints"
    for folder in (tmp_path / "weights", cache):
        folder.mkdir(parents=True)
        (folder / I3D).symlink_to(weights / I3D)
    (tmp_path / "weights/syncnet_v2.model").touch()
    assert Tools().find(I3D) is None and Tools(cache.parent).find(I3D) is None
    assert Tools(tmp_path / "weights").find(I3D) and Tools().find("syncnet_v2.model")
    (line,) = Fvd.missing(Tools())
    assert "a program" in line and "--weights" in line


def test_a_measure_that_cannot_be_loaded_is_named_whatever_it_raises(
    talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mismatch(self: Ssim, tools: Tools) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(Ssim, "__init__", mismatch)
    found = evaluate(talking / "made/1.mp4", talking / "true/1.mp4", ["ssim", "psnr"])
    assert found.totals["ssim"].missing == ["RuntimeError: operator torchvision::nms does not exist"]
    assert found.totals["psnr"].value is not None


def test_huge_pictures_cost_their_row(talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.evaluation.videos.MAX_PIXELS", SIZE * SIZE - 1)
    (row,) = evaluate(talking / "made/1.mp4", talking / "true/1.mp4", ["psnr"]).videos
    assert f"{SIZE}x{SIZE}" in row.reason
    with pytest.raises(VideoError, match="picture too large"):  # also where only the frames say so
        next(frames_at(talking / "made/1.mp4", 25, 1.0))


def test_damaged_networks_are_named(talking: Path, weights: Path, tmp_path: Path) -> None:
    for name in ("i3d_torchscript.pt", "syncnet_v2.model", "scrfd_10g_bnkps.onnx", "glintr100.onnx", "2d106det.onnx"):
        (tmp_path / name).write_bytes(b"nonsense")
    found = evaluate(talking / "made/1.mp4", talking / "true/1.mp4", ["fvd", "sync-d", "m-lmd", "psnr"], tmp_path)
    assert set(found.missing) == {"fvd", "sync-d", "m-lmd"}
    assert "i3d_torchscript.pt" in found.totals["fvd"].missing[0]
    assert "syncnet_v2.model" in found.totals["sync-d"].missing[0]
    assert found.totals["psnr"].value is not None


# --- Networks of packages that may be absent ----------------------------------------------------------------------


def test_fid_reads_the_published_weights_without_pickled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = inception.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # it cannot be made without weights
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        torch.save(kind("any", ["2048"]).state_dict(), tmp_path / INCEPTION)
    made = write_video(tmp_path / "made.mp4", plain(200, 60, 60, count=3))
    true = write_video(tmp_path / "true.mp4", plain(60, 60, 200, count=3))
    assert evaluate(true, true, ["fid"], tmp_path).totals["fid"].value == pytest.approx(0, abs=1e-6)
    found = evaluate(made, true, ["fid"], tmp_path).totals["fid"]
    assert found.value > 0 and "few for 2048" in found.note

    torch.save(nn.Linear(1, 1), tmp_path / INCEPTION)
    with pytest.raises(CheckpointError, match="never run"):
        load_inception(Tools(tmp_path))


def test_lpips_reads_torchvisions_alexnet(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    trunk = torchvision.models.alexnet(weights=None)
    torch.save(trunk.state_dict(), tmp_path / ALEXNET)
    metric = Lpips(Tools(tmp_path))
    metric.start(None)
    real = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    made = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    metric.update(Chunk(made, real, 0, 25))
    reading = metric.finish()["lpips"]
    # The package's own way to the same weights.
    net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for ours, theirs in zip(net.net.parameters(), trunk.features.parameters(), strict=True):
        ours.data.copy_(theirs)
    expected = net(made / 127.5 - 1, real / 127.5 - 1).flatten()
    np.testing.assert_allclose(reading.curve, expected.detach().numpy(), rtol=1e-4)


def test_names_of_videos_are_text_in_the_report() -> None:
    import html.parser

    from training.evaluation.report import _escaped, _row

    name = "a|b`c`*d* <script>alert(1)</script> [x](javascript:y) ![z](w)\n# head &lt; https://x www.y \x1b[0m\u2028_i_"
    name += " a_b"
    cell = _escaped(name)
    assert "\n" not in cell and cell.isprintable() and "a_b" in cell
    for mark in "|`*<>[]!&#":
        assert all(cell[place - 1] == "\\" for place, found in enumerate(cell) if found == mark), mark
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda *_: pytest.fail("a tag")
    parser.feed(cell.replace("\\<", "&lt;"))
    assert len(re.findall(r"(?<!\\)\|", _row([cell, "1"]))) == 3
