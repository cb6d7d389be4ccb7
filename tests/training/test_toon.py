"""Toon faces are what their parameters say, performances carry their emotion, and the judge's measures measure."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from memo_core import MemoPipeline
from memo_core.inputs.emotion import EmotionTrack
from memo_core.release import EMOTIONS
from memo_core.sampling.vae import encode_frames
from training.toon import heads
from training.toon import judge as judging
from training.toon.evaluate import draw_case
from training.toon.voices import RATE


def face(seed: int = 3) -> heads.Identity:
    return heads.sample_identity(np.random.default_rng(seed))


def motion_with(**values: float) -> Tensor:
    motion = heads.neutral_motion()[None]
    for name, value in values.items():
        motion[0, heads.MOTION.index(name)] = value
    return motion


def changed(identity: heads.Identity, before: dict[str, float], after: dict[str, float]) -> Tensor:
    """bool [128, 128]: pixels that visibly differ between two motions."""
    pictures = heads.render(identity, torch.cat([motion_with(**before), motion_with(**after)])).int()
    return (pictures[0] - pictures[1]).abs().amax(dim=0) > 12


def utterance(seed: int, frames: int = 120) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    return SimpleNamespace(mouth_open=rng.uniform(0.0, 1.0, frames), mouth_width=rng.uniform(-1.0, 1.0, frames))


# --- Faces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 96, 128, 200])
def test_frames_have_the_asked_shape_at_any_size(size: int) -> None:
    frames = heads.render(face(), heads.neutral_motion().repeat(3, 1), size)
    assert frames.shape == (3, 3, size, size) and frames.dtype == torch.uint8


def test_a_seed_always_draws_the_same_face_and_another_seed_another() -> None:
    assert face(5) == face(5)
    assert face(5) != face(6)
    neutral = heads.neutral_motion()[None]
    assert torch.equal(heads.render(face(5), neutral), heads.render(face(5), neutral))


def test_a_frame_does_not_depend_on_the_frames_drawn_with_it() -> None:
    motion = judging.random_motion(20, np.random.default_rng(0))
    together = heads.render(face(), motion).int()
    alone = torch.cat([heads.render(face(), row[None]) for row in motion]).int()
    assert (together - alone).abs().max() <= 1  # rounding


def test_edges_are_antialiased_and_a_face_looks_alike_at_every_size() -> None:
    motion = motion_with(mouth_open=0.7, mouth_corners=0.5)
    small, large = heads.render(face(), motion, 128)[0].float(), heads.render(face(), motion, 512)[0].float()
    shrunk = torch.nn.functional.avg_pool2d(large[None], 4)[0]
    assert judging.ssim(small / 255.0, shrunk / 255.0) > 0.995  # 0.95 to 0.97 with hard edges
    assert (small - shrunk).abs().mean() < 0.8  # 2 to 4 with hard edges


@pytest.mark.parametrize("style", list(heads.HAIR_STYLES))
def test_every_haircut_leaves_eyes_and_mouth_free(style: str) -> None:
    identity = replace(
        face(),
        hair_style=style,
        hair=(0.0, 1.0, 0.0),
        background_top=(0.0, 0.0, 1.0),
        background_bottom=(0.0, 0.0, 1.0),
        iris=(1.0, 0.0, 0.0),
    )
    picture = heads.render(identity, motion_with(lids=1.0))[0].int()
    green = picture[1] - picture[0]
    assert (green > 60).sum() > 700, "the hair is not seen"
    top, bottom = round(heads.HEAD_Y + identity.eye_y) - 9, round(heads.HEAD_Y + identity.mouth_y) + 8
    assert (green[top:bottom, 44:85] < 60).all()


@pytest.mark.parametrize(
    ("after", "rows", "at_least"),
    [
        ({"mouth_open": 1.0}, (68, 112), 300),
        ({"mouth_width": 1.0}, (72, 96), 12),
        ({"mouth_corners": 1.0}, (70, 96), 60),
        ({"brow_raise": 1.0}, (24, 62), 120),
        ({"brow_slant": -1.0}, (24, 62), 60),
        ({"lids": 0.0}, (36, 72), 250),
        ({"gaze_x": 1.0}, (36, 72), 80),
        ({"gaze_y": 1.0}, (36, 72), 60),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_parameter_moves_its_feature_and_nothing_else(
    seed: int, after: dict[str, float], rows: tuple[int, int], at_least: int
) -> None:
    moved = changed(face(seed), {}, after)
    assert moved.sum() >= at_least
    assert moved[rows[0] : rows[1]].sum() == moved.sum()
    assert not moved[:, :20].any() and not moved[:, -20:].any()


@pytest.mark.parametrize("name", ["head_turn", "head_tilt"])
def test_the_head_moves_but_background_and_shoulders_stay(name: str) -> None:
    moved = changed(replace(face(), hair_style="crop"), {}, {name: 1.0})
    assert moved.sum() > 800
    assert not moved[122:].any() and not moved[:, :12].any() and not moved[:, -12:].any()


def test_features_turn_to_the_viewers_right_and_more_than_the_head() -> None:
    identity = face()
    pictures = heads.render(identity, torch.cat([motion_with(head_turn=v) for v in (-1.0, 0.0, 1.0)])).float()
    y, x = round(heads.HEAD_Y + identity.eye_y), torch.arange(128.0)
    white = (pictures[:, :, y - 3 : y + 8].amin(dim=1) > 235).sum(dim=1).float()
    centres = (white * x).sum(dim=1) / white.sum(dim=1)
    assert 3.0 < float(centres[1] - centres[0]) < 7.0 and 3.0 < float(centres[2] - centres[1]) < 7.0


def test_an_open_mouth_is_unmistakable() -> None:
    """Teeth, tongue and the dark between them: up to 22 pixels high, growing steadily, in a mouth 30 pixels wide."""
    identity = face()
    motion = torch.cat([motion_with(mouth_open=opening) for opening in (0.0, 0.25, 0.5, 0.75, 1.0)])
    column = heads.render(identity, motion)[:, :, 76:, 64].float() / 255.0
    inside = torch.tensor([(0.27, 0.06, 0.09), (0.89, 0.40, 0.42), (0.98, 0.97, 0.95)])
    heights = ((column[:, None] - inside[None, :, :, None]).abs().amax(dim=2) < 0.15).any(dim=1)[:, :30].sum(dim=1)
    assert int(heights[0]) <= 2 and int(heights[-1]) >= 22
    assert int(heights.diff().min()) >= 3
    assert changed(identity, {}, {"mouth_open": 1.0}).any(dim=0).sum() >= 30


def test_values_out_of_range_are_clamped() -> None:
    wild = torch.full((1, len(heads.MOTION)), 5.0)
    assert torch.equal(heads.render(face(), wild), heads.render(face(), torch.ones(1, len(heads.MOTION))))


@pytest.mark.parametrize(
    ("motion", "size", "says"),
    [
        (torch.zeros(4, 9), 128, "got [4, 9]"),
        (torch.zeros(10), 128, "got [10]"),
        (torch.full((1, 10), math.nan), 128, "finite"),
        (torch.zeros(1, 10), 32, "got 32"),
    ],
)
def test_bad_arguments_are_named(motion: Tensor, size: int, says: str) -> None:
    with pytest.raises(ValueError) as error:
        heads.render(face(), motion, size)
    assert says in str(error.value)


def test_the_mask_holds_still_while_the_face_plays() -> None:
    for seed in range(4):
        identity = face(seed)
        mask = heads.mask_outside_mouth_and_eyes(identity)
        assert mask.shape == (128, 128) and 0.4 < float(mask.float().mean()) < 0.8
        rng = np.random.default_rng(seed)
        motion = judging.random_motion(32, rng)
        motion[:, [heads.MOTION.index("head_turn"), heads.MOTION.index("head_tilt")]] = 0.0
        frames = heads.render(identity, motion).int()
        moved = (frames - frames[:1]).abs().amax(dim=(0, 1)) > 12
        assert (moved & mask).sum() < 60  # the dropping jaw widens the cheeks by a pixel
        assert (moved & ~mask).sum() > 1000


def test_the_default_portrait_never_changes_silently() -> None:
    picture = heads.default_portrait(64)
    assert picture.shape == (3, 64, 64)
    assert heads.sample_identity(np.random.default_rng(heads.PORTRAIT_SEED)).hair_style == "pigtails"


# --- Performances -----------------------------------------------------------------------------------------------------


def test_signatures_belong_to_the_first_eight_emotions() -> None:
    assert len(heads.SIGNATURES) == 8
    corners = dict(zip(EMOTIONS, (row[0] for row in heads.SIGNATURES), strict=False))
    assert max(corners, key=corners.__getitem__) == "happy" and corners["sad"] < -0.5
    raised = dict(zip(EMOTIONS, (row[1] for row in heads.SIGNATURES), strict=False))
    assert max(raised, key=raised.__getitem__) == "surprised" and min(raised, key=raised.__getitem__) == "angry"


@pytest.mark.parametrize("emotion", range(8))
def test_a_performance_follows_the_utterance_and_stays_in_range(emotion: int) -> None:
    spoken = utterance(emotion)
    motion = heads.perform(spoken, emotion, np.random.default_rng(emotion))
    assert motion.shape == (120, 10) and motion.dtype == torch.float32
    assert torch.allclose(motion[:, 0].double(), torch.from_numpy(spoken.mouth_open), atol=1e-6)
    assert torch.allclose(motion[:, 1].double(), torch.from_numpy(spoken.mouth_width), atol=1e-6)
    for i, name in enumerate(heads.MOTION):
        low = 0.0 if name in ("mouth_open", "lids") else -1.0
        assert low <= float(motion[:, i].min()) and float(motion[:, i].max()) <= 1.0


def test_a_seed_always_gives_the_same_performance() -> None:
    first = heads.perform(utterance(0), 3, np.random.default_rng(1))
    assert torch.equal(first, heads.perform(utterance(0), 3, np.random.default_rng(1)))
    assert not torch.equal(first, heads.perform(utterance(0), 3, np.random.default_rng(2)))


def test_every_emotion_is_read_back_from_its_performances() -> None:
    for emotion in range(8):
        for seed in range(12):
            motion = heads.perform(utterance(seed), emotion, np.random.default_rng([emotion, seed]))
            probabilities = judging.read_emotion(motion)
            assert probabilities.shape == (8,) and abs(float(probabilities.sum()) - 1.0) < 1e-5
            assert int(probabilities.argmax()) == emotion
            # and it lasts: each second says the same
            assert int(judging.read_emotion(motion[60:90]).argmax()) == emotion


def test_performers_blink_glance_and_keep_their_heads_quiet() -> None:
    motion = heads.perform(utterance(0, 900), 4, np.random.default_rng(0))
    column = {name: motion[:, i] for i, name in enumerate(heads.MOTION)}
    shut = column["lids"] < 0.1
    blinks = int((shut[1:] & ~shut[:-1]).sum())
    assert 4 <= blinks <= 20 and float(shut.float().mean()) < 0.1
    assert float(column["gaze_x"].std()) > 0.1
    for name in ("head_turn", "head_tilt"):
        assert float(column[name].abs().max()) < 0.6
        assert float(column[name].diff().abs().max()) < 0.06, "the head jerks"


def test_unknown_emotions_and_empty_utterances_are_refused() -> None:
    with pytest.raises(ValueError, match="got 8"):
        heads.perform(utterance(0), 8, np.random.default_rng(0))
    with pytest.raises(ValueError, match="not empty"):
        heads.perform(utterance(0, 0), 1, np.random.default_rng(0))


# --- Measures and the judge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-4, 0, 3])
def test_correlation_finds_the_shift(shift: int) -> None:
    signal = torch.randn(140, generator=torch.Generator().manual_seed(0))
    late, early = signal[10 - shift : 110 - shift] * 3.0 + 1.0, signal[10:110]
    result = judging.correlation_and_lag(late, early, max_lag=6)
    assert result.lag == shift and result.best == pytest.approx(1.0)
    assert result.correlation == pytest.approx(float(torch.corrcoef(torch.stack([late, early]))[0, 1]), abs=1e-5)


def test_correlation_of_opposites_and_of_a_still_track() -> None:
    signal = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert judging.correlation_and_lag(signal, -signal, 0).correlation == pytest.approx(-1.0)
    assert judging.correlation_and_lag(signal, torch.zeros(50), 3) == (0.0, 0, 0.0)
    with pytest.raises(ValueError, match="above 11"):
        judging.correlation_and_lag(signal[:11], signal[:11], 10)


def test_ssim_of_known_pictures() -> None:
    picture = torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert judging.ssim(picture, picture) == pytest.approx(1.0, abs=1e-5)
    # Flat pictures differ in luminance alone, which has a closed form.
    a, b = torch.full((3, 32, 32), 0.2), torch.full((3, 32, 32), 0.6)
    assert judging.ssim(a, b) == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-4)
    assert judging.ssim((a * 255).to(torch.uint8), a) == pytest.approx(1.0, abs=1e-4)
    assert judging.ssim(picture, 1.0 - picture) < 0.0


def test_ssim_counts_only_what_the_mask_leaves() -> None:
    picture = torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0))
    spoilt = picture.clone()
    spoilt[:, :, :20] = 0.0
    mask = torch.zeros(48, 48, dtype=torch.bool)
    mask[:, 26:] = True  # further than the window's half width from the damage
    assert judging.ssim(picture, spoilt, mask) == pytest.approx(1.0, abs=1e-5)
    assert judging.ssim(picture, spoilt, ~mask) < 0.5
    with pytest.raises(ValueError, match="nothing to compare"):
        judging.ssim(picture, spoilt, torch.zeros_like(mask))


def test_a_judge_comes_back_from_disk_nearly_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = judging.Judge().eval()
    judge.save(tmp_path / "judge.safetensors")
    assert (tmp_path / "judge.safetensors").stat().st_size < 1_500_000
    frames = heads.render(face(), judging.random_motion(4, np.random.default_rng(0)))
    loaded = judging.Judge.load(tmp_path / "judge.safetensors")
    assert torch.allclose(judge.read(frames), loaded.read(frames), atol=5e-3)
    assert torch.allclose(loaded.read(frames), loaded.read(frames.float() / 255.0), atol=1e-6)


def test_the_shipped_judge_reads_faces_it_has_never_seen() -> None:
    figures = judging.examine(judging.Judge.load(), faces=12, clips=16, seed=7)
    for name in ("mouth_open", *heads.SIGNATURE_COLUMNS):  # all that is graded
        assert figures[f"r2/{name}"] >= 0.9, figures
    assert figures["emotion"] >= 0.9, figures


# --- The checkpoint after a blink -------------------------------------------------------------------------------------

BLINKS = {"cut off halfway": heads.BLINK_LIDS[:3], "shut for a whole window": np.zeros(16)}
LIDS = heads.MOTION.index("lids")


@pytest.fixture(scope="module")
def toon() -> MemoPipeline:
    return MemoPipeline.from_pretrained("toon")


@pytest.mark.parametrize("number", [0, 1, 4, 7])  # faces and voices: angry, disgusted, neutral, surprised
@torch.no_grad()
def test_eyes_that_were_shut_are_open_in_the_next_window(toon: MemoPipeline, number: int) -> None:
    """The memory tells what was, and the past frames are shut; still the eyes open at once, as wide as the emotion has
    them, and stay so. (8 faces, 6 and 20 steps: never otherwise.)"""
    case = draw_case(number, seconds=1.1)
    audio = toon.encode_audio(case.spoken.waveform, RATE, fps=heads.FPS)
    emotion = EmotionTrack.constant(EMOTIONS[case.spoken.emotion], audio.num_padded_frames)
    ref = toon.encode_reference(case.portrait.permute(1, 2, 0).numpy())
    usual = heads.SIGNATURES[case.spoken.emotion][heads.SIGNATURE_COLUMNS.index("lids")]
    job = toon.job(ref, audio, emotion, start=16, num_frames=16, steps=6, seed=number)
    judge = judging.Judge.load()
    for blink, factors in BLINKS.items():
        motion = case.motion[:16].clone()
        motion[:, LIDS] = usual
        motion[16 - len(factors) :, LIDS] *= torch.from_numpy(factors).float()
        drawn = heads.render(case.identity, motion)
        assert float(judge.read(drawn)[-1, LIDS]) < 0.2, "the judge sees them shut"
        past = encode_frames(toon.nets.vae, drawn.float() / 127.5 - 1)
        memory = job.entering(toon.nets).push(past, ref.face_embedding, toon.nets.digest, ref.digest)
        (window,) = toon.sample_windows(replace(job, memory=memory))
        lids = judge.read(window.frames)[:, LIDS]
        assert float(lids.min()) > 0.7 * usual, f"{blink}: {lids}"
