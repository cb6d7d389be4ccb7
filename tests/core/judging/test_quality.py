"""A clip's faults show in its curves and are said in words; a collapse is noticed, a good clip is left alone."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator

import librosa
import numpy as np
import pytest
import torch
from common import ROOT
from PIL import Image

from memo_core import MemoPipeline
from memo_core.encoders.face import Face
from memo_core.errors import ComposeError, PortraitError
from memo_core.judging.collapse import CollapseDetector
from memo_core.judging.drawings.quality import draw_quality
from memo_core.judging.quality import Quality, measure, to_lab
from training.toon import heads

ASSETS = ROOT / "assets"


@pytest.fixture(scope="module")
def portrait() -> torch.Tensor:
    """[3, 128, 128] in [-1, 1]."""
    levels = np.array(Image.open(ASSETS / "portrait.png").convert("RGB").resize((128, 128)))
    return torch.from_numpy(levels).permute(2, 0, 1).float() / 127.5 - 1


@pytest.fixture(scope="module")
def talk(portrait: torch.Tensor) -> torch.Tensor:
    """The portrait for three seconds, [90, 128, 128, 3] in [0, 1]; it nods a pixel now and then."""
    still = ((portrait + 1) / 2).permute(1, 2, 0)
    return torch.stack([still.roll(i // 5 % 2, 0) for i in range(90)])


def window(frames: torch.Tensor) -> torch.Tensor:
    """[F, H, W, 3] -> [F, 3, H, W]."""
    return frames.permute(0, 3, 1, 2)


def test_a_clip_of_the_portrait_itself_is_perfect(portrait: torch.Tensor) -> None:
    still = ((portrait + 1) / 2).permute(1, 2, 0)
    quality = measure([still] * 20, portrait, fps=25)
    assert quality.num_frames == 20 and quality.fps == 25 and quality.identity is None
    np.testing.assert_allclose(quality.colour, 0, atol=1e-3)
    np.testing.assert_allclose(quality.sharpness, 1, atol=1e-5)
    np.testing.assert_allclose(quality.likeness, 1, atol=1e-5)
    np.testing.assert_array_equal(quality.motion, 0)
    levels = measure([(still * 255).round().to(torch.uint8).numpy()] * 3, portrait)
    assert levels.colour.max() < 0.1 and abs(levels.sharpness - 1).max() < 0.01


def test_lab_has_the_published_values() -> None:
    colours = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0.5, 0.5, 0.5]])
    wanted = [
        [100, 0, 0],
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
        [0] * 3,
        [53.39, 0, 0],
    ]
    torch.testing.assert_close(to_lab(colours[:, :, None, None])[..., 0, 0], torch.tensor(wanted), rtol=0, atol=0.03)


def test_motion_is_the_difference_to_the_frame_before_across_batches(portrait: torch.Tensor) -> None:
    frames = [np.full((128, 128, 3), 100 + 3 * (i >= 16) + 7 * (i >= 20), np.uint8) for i in range(30)]
    motion = measure(iter(frames), portrait).motion
    assert motion[16] == pytest.approx(3, abs=1e-3) and motion[20] == pytest.approx(7, abs=1e-3)
    assert motion.sum() == pytest.approx(10, abs=1e-3)


def shifted(talk: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(0, 0.4, len(talk))[:, None, None, None]
    return torch.lerp(talk, torch.tensor([1.0, 0.5, 0.2]), weights)


def blurring(talk: torch.Tensor) -> torch.Tensor:
    soft = window(talk)
    for _ in range(4):
        soft = torch.nn.functional.avg_pool2d(soft, 3, 1, 1, count_include_pad=False)
    return torch.lerp(talk, soft.permute(0, 2, 3, 1), torch.linspace(0, 1, len(talk))[:, None, None, None])


def noisy(talk: torch.Tensor) -> torch.Tensor:
    grain = torch.randn(talk.shape, generator=torch.Generator().manual_seed(0))
    return (talk + 0.2 * grain * torch.linspace(0, 1, len(talk))[:, None, None, None]).clamp(0, 1)


def jumping(talk: torch.Tensor) -> torch.Tensor:
    return torch.cat([talk[:60], 1 - talk[60:61], talk[61:]])


def frozen(talk: torch.Tensor) -> torch.Tensor:
    return talk[:1].expand_as(talk)


def melting(talk: torch.Tensor) -> torch.Tensor:
    return torch.stack([frame.roll(-(i // 3), 1) for i, frame in enumerate(talk)])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (shifted, "colours drift"),
        (blurring, "gets blurred"),
        (noisy, "gets noisy"),
        (jumping, "jumps"),
        (frozen, "stands still"),
        (melting, "likeness fades"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fault_is_named(talk: torch.Tensor, portrait: torch.Tensor, fault, words: str) -> None:
    assert words in measure(fault(talk), portrait).summary().splitlines()[0]


def test_a_good_clip_holds_and_the_worst_moment_is_given_its_time(talk: torch.Tensor, portrait: torch.Tensor) -> None:
    assert measure(talk, portrait).summary().splitlines()[0] == "90 frames, 3.0 s at 30 fps: holds"
    frames = talk.clone()
    frames[45] = frames[45] * 0.8
    lines = measure(frames, portrait).summary().splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["Colour", "Sharpness", "Motion", "Likeness"]
    assert re.search(r"worst [\d.]+ at 1\.5 s", lines[1])


class Analyzer:
    """Sees a face where a picture is not black; its embedding turns with the mean of red."""

    looks = 0

    def detect(self, image: np.ndarray) -> list[Face]:
        self.looks += 1
        assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
        return [Face((0, 0, 9, 9), np.zeros((5, 2), np.float32), 0.9)] if image.any() else []

    def embed(self, image: np.ndarray, face: Face) -> np.ndarray:
        angle = image[..., 0].mean() / 255 * np.pi / 2
        return 7 * np.array([np.cos(angle), np.sin(angle)] + [0] * 510, np.float32)


def test_identity_follows_the_face_and_needs_one(portrait: torch.Tensor) -> None:
    embedding = torch.zeros(1, 512)
    embedding[0, 0] = 3.0
    frames = torch.full((60, 64, 64, 3), 0.01)
    frames[..., 0] = torch.linspace(0, 1, 60)[:, None, None]
    analyzer = Analyzer()
    quality = measure(frames, portrait, analyzer, embedding)
    assert quality.identity is not None and quality.identity.shape == (60,)
    np.testing.assert_allclose(quality.identity, np.cos(np.linspace(0, np.pi / 2, 60)), atol=0.02)
    assert analyzer.looks == 9, "every eighth frame and the last"
    assert "becomes another person" in quality.summary()
    assert measure(frames * 0, portrait, analyzer, embedding).identity.max() == 0, "no face"
    for without in ((None, embedding), (analyzer, None), (analyzer, embedding * 0)):
        assert measure(frames[:3], portrait, *without).identity is None


def test_frames_of_another_size_are_compared_in_the_same_way(talk: torch.Tensor) -> None:
    large = torch.nn.functional.interpolate(window(talk[:1]), scale_factor=2, mode="bicubic").clamp(0, 1)[0] * 2 - 1
    quality = measure(talk[:4], large)
    assert quality.colour.max() < 1 and quality.likeness.min() > 0.98 and 0.5 < quality.sharpness.min() < 2


def test_a_long_clip_is_measured_as_it_comes(portrait: torch.Tensor) -> None:
    alive: list[weakref.ref] = []

    def frames() -> Iterator[torch.Tensor]:
        for _ in range(200):
            frame = torch.rand(16, 16, 3)
            alive.append(weakref.ref(frame))
            assert sum(reference() is not None for reference in alive) <= 40
            yield frame

    assert measure(frames(), portrait).num_frames == 200


def test_what_cannot_be_measured_is_refused(portrait: torch.Tensor) -> None:
    frame = torch.zeros(128, 128, 3)
    for frames, match in (
        ([], "no frames"),
        ([torch.zeros(3, 128, 128)], r"\[3, 128, 128\]"),
        ([torch.zeros(64, 128, 3)], "another aspect"),
        ([frame, torch.zeros(64, 64, 3)], "128x128 and 64x64"),
        ([frame] * 16 + [torch.zeros(64, 64, 3)], "128x128 and 64x64"),
    ):
        with pytest.raises(ComposeError, match=match):
            measure(frames, portrait)
    with pytest.raises(ComposeError, match="fps is 0"):
        measure([frame], portrait, fps=0)
    for bad in (portrait * 255, portrait[None], portrait * float("nan")):
        with pytest.raises(PortraitError):
            measure([frame], bad)


# --- Collapse ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_clip_of_the_shipped_checkpoint_holds() -> None:
    pipe = MemoPipeline.from_pretrained("toon")
    waveform, rate = librosa.load(ASSETS / "voice.wav", sr=None)
    audio = pipe.encode_audio(waveform[: 2 * rate], rate)
    reference = pipe.encode_reference(Image.open(ASSETS / "portrait.png"))
    clip, _ = pipe.sample_clip(reference, audio, num_frames=32, steps=4)
    detector = CollapseDetector(reference.pixels)
    assert [detector.update(frames) for frames in window(clip.to_tensor()).split(16)] == [None] * 2
    assert measure(clip.frames(), reference.pixels).summary().splitlines()[0].endswith(": holds")


@pytest.mark.parametrize("seed", range(3))
def test_any_toon_face_holds(seed: int) -> None:
    identity = heads.sample_identity(np.random.default_rng(seed))
    drift = 0.3 * torch.rand(32, 10, generator=torch.Generator().manual_seed(seed))
    motion = heads.neutral_motion() + drift
    face = heads.render(identity, heads.neutral_motion()[None])[0].float() / 127.5 - 1
    frames = heads.render(identity, motion).float() / 255
    detector = CollapseDetector(face)
    assert detector.update(frames[:16]) is None and detector.update(frames[16:]) is None


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda good: good * 0.05 + 0.475, "flat"),
        (lambda good: torch.rand_like(good), "noise"),
        (lambda good: (0.5 + 0.2 * torch.randn_like(good)).clamp(0, 1), "noise"),
        (lambda good: good * 0 + torch.tensor([1.0, 0, 1])[:, None, None], "flat"),
        (lambda good: 1 - good, "colours"),
        (lambda good: (good.mean(1, True) + 8 * (good - good.mean(1, True))).clamp(0, 1), "colours"),
        (lambda good: good * 0.3 + 0.7 * torch.tensor([1.0, 0, 0])[:, None, None], "colours"),
        (lambda good: torch.nn.functional.interpolate(good[..., ::16, ::16], 128, mode="bilinear"), "blurred"),
        (lambda good: good * float("nan"), "NaN"),
    ],
    ids=["grey", "white noise", "noise", "one colour", "negative", "oversaturated", "red", "blurred", "nan"],
)
def test_a_collapse_is_noticed_at_the_second_broken_window(
    talk: torch.Tensor, portrait: torch.Tensor, broken, words: str
) -> None:
    torch.manual_seed(0)
    good = window(talk[:16])
    detector = CollapseDetector(portrait)
    assert detector.update(good) is None
    assert detector.update(broken(good)) is None, "one bad window may pass"
    assert detector.update(good) is None
    assert detector.update(broken(good)) is None, "the count begins anew"
    reason = detector.update(broken(good)[:7])
    assert reason is not None and reason.startswith("the clip has collapsed: ") and words in reason


def test_a_slow_fade_to_grey_is_noticed_before_its_end(talk: torch.Tensor, portrait: torch.Tensor) -> None:
    detector = CollapseDetector(portrait)
    answers = []
    for index in range(12):
        weight = min(1.0, index / 8)
        answers.append(detector.update(window(torch.lerp(talk[:16], torch.tensor(0.5), weight))))
    assert answers[:8] == [None] * 8 and all(answers[9:])


def test_a_window_of_another_shape_is_refused(portrait: torch.Tensor, talk: torch.Tensor) -> None:
    with pytest.raises(ComposeError, match=r"\[16, 128, 128, 3\]"):
        CollapseDetector(portrait).update(talk[:16])
    with pytest.raises(PortraitError, match="reach from"):
        CollapseDetector(portrait * 2)


# --- Picture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "width"), [(1, 600), (2, 1000), (90, 1000), (5000, 700)])
def test_the_curves_are_drawn(frames: int, width: int) -> None:
    rng = np.random.default_rng(0)
    curves = [rng.random(frames).astype(np.float32) for _ in range(5)]
    image = draw_quality(Quality(*curves, fps=30), width)
    assert image.mode == "RGB" and image.width == width
    without = draw_quality(Quality(*curves[:4], None, fps=30), width)
    assert image.height - without.height == 132, "one panel less"
    for colour in ((214, 93, 66), (51, 122, 183), (120, 94, 180), (42, 140, 98), (176, 124, 20)):
        assert int((np.asarray(image) == colour).all(-1).sum()) > 10


def test_the_picture_shows_where_the_curve_runs() -> None:
    high, low = np.full(90, 0.9, np.float32), np.full(90, 0.1, np.float32)
    rows = []
    for values in (high, low):
        quality = Quality(high, high, high, values, None, 30)
        pixels = np.asarray(draw_quality(quality))[:, 400:600]
        rows.append(np.argwhere((pixels == (42, 140, 98)).all(-1))[:, 0].mean())
    assert rows[1] - rows[0] == pytest.approx(0.8 * 88 / 1, abs=3)


def test_a_picture_too_narrow_is_refused() -> None:
    one = np.ones(3, np.float32)
    with pytest.raises(ComposeError, match="width is 200"):
        draw_quality(Quality(one, one, one, one, None, 30), 200)
