"""MemoPipeline from a picture and a recording to frames."""

from __future__ import annotations

import inspect
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from common import relative_l2
from PIL import Image
from torch import Tensor

from memo_core import AudioTrack, Clip, EmotionTrack, MemoPipeline, MemoryState, Reference
from memo_core.checkpoint import layout
from memo_core.encoders.face import DETECTOR, EMBEDDER, FOLDER, Face, _warn_once
from memo_core.errors import CheckpointError, PortraitError, SamplingError
from memo_core.inputs.portrait import prepare_portrait
from memo_core.inputs.sound import load_audio


@pytest.fixture(scope="module")
def picture(expected: dict[str, Tensor]) -> Image.Image:
    """A photograph's shape and size, from the fixture's portrait."""
    levels = ((expected["in.reference_image"][0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(levels).resize((300, 220), Image.Resampling.BICUBIC)


class Faces:
    """A face analyzer that finds a large face at the right and a small one at the left."""

    found = [
        Face((180.0, 60.0, 260.0, 160.0), np.zeros((5, 2), np.float32), 0.9),
        Face((20.0, 40.0, 60.0, 90.0), np.zeros((5, 2), np.float32), 0.8),
    ]

    def detect(self, image: np.ndarray) -> list[Face]:
        return self.found

    def embed(self, image: np.ndarray, seen: Face) -> np.ndarray:
        return np.full(512, seen.box[0], np.float32)


class NoFaces(Faces):
    found = []


def with_faces(pipe: MemoPipeline, analyzer: Faces | None) -> MemoPipeline:
    other = MemoPipeline(pipe.nets)
    other.face_analyzer = analyzer  # as if the checkpoint had such models
    return other


# The reference


def test_a_tensor_of_allowed_size_is_used_bit_for_bit(pipe: MemoPipeline, expected: dict[str, Tensor]) -> None:
    image = expected["in.reference_image"][0, :, :64]
    reference = pipe.encode_reference(image, expected["in.face_embedding"])
    assert torch.equal(reference.pixels, image) and reference.latents.shape == (1, 4, 8, 16)
    again = pipe.encode_reference(image, expected["in.face_embedding"])
    assert torch.equal(again.latents, reference.latents) and again.digest == reference.digest
    assert reference.latents.dtype == torch.float32


def test_a_picture_gets_the_size_of_training_or_the_one_asked_for(pipe: MemoPipeline, picture: Image.Image) -> None:
    embedding = np.zeros(512, np.float32)
    assert pipe.default_size == (128, 128)
    for image in (picture, np.asarray(picture), torch.from_numpy(np.array(picture))):
        reference = pipe.encode_reference(image, embedding)
        assert reference.pixels.shape == (3, 128, 128)
        assert torch.equal(reference.pixels, pipe.encode_reference(picture, embedding).pixels)
    assert pipe.encode_reference(picture, embedding, size=64).latents.shape == (1, 4, 8, 8)
    assert pipe.encode_reference(picture, embedding, size=(64, 192)).latents.shape == (1, 4, 8, 24)
    as_float = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    assert pipe.encode_reference(as_float, embedding, size=64).pixels.shape == (3, 64, 64)


@pytest.mark.parametrize(
    "image, options, named",
    [
        (torch.zeros(3, 100, 128), {}, "100x128.*nearest 64x128 or 128x128"),
        (torch.zeros(3, 128, 128), {"size": 100}, "100x100.*64x64"),
        (torch.zeros(3, 128, 128), {"size": 0}, "0x0.*nearest 64x64"),
        (torch.zeros(1, 3, 128, 128), {}, r"tensor \[1, 3, 128, 128\]"),
        (torch.zeros(128, 128, 3), {}, r"tensor \[128, 128, 3\]"),
        (torch.zeros(128), {}, r"tensor \[128\]"),
        (torch.zeros(3, 100, 128, dtype=torch.uint8), {}, r"uint8 \[3, 100, 128\]"),
        (torch.full((3, 64, 64), 2.0), {}, "from 2 to 2"),
        (torch.full((3, 64, 64), float("nan")), {}, "nan"),
        (np.zeros((64, 64, 3), np.float32), {}, r"float32 \[64, 64, 3\]"),
        (torch.zeros(3, 64, 64), {"crop": "square"}, "crop is 'square'"),
        (torch.zeros(3, 64, 64), {"no_face": "error"}, "there are no face models"),
        (torch.zeros(3, 64, 64), {"face_embedding": torch.zeros(511)}, r"512 .* received \[511\]"),
        (torch.zeros(3, 64, 64), {"face_embedding": torch.zeros(2, 512)}, r"received \[2, 512\]"),
        (torch.zeros(3, 64, 64), {"face_embedding": torch.full((512,), float("inf"))}, "NaN or infinite"),
    ],
)
def test_bad_portraits_are_named(pipe: MemoPipeline, image, options: dict, named: str) -> None:
    with pytest.raises(PortraitError, match=named):
        pipe.encode_reference(image, **options)


def test_the_largest_face_or_the_one_asked_for_is_described(pipe: MemoPipeline, picture: Image.Image) -> None:
    seeing = with_faces(pipe, Faces())
    assert seeing.encode_reference(picture).face_embedding.eq(180).all()
    assert seeing.encode_reference(picture, face_index=1).face_embedding.eq(20).all()
    assert seeing.encode_reference(picture, face_box=(10, 10, 70, 100)).face_embedding.eq(20).all()
    with pytest.raises(PortraitError, match="face_index is 2, but 2 faces"):
        seeing.encode_reference(picture, face_index=2)


def test_cropping_to_the_face(pipe: MemoPipeline, picture: Image.Image) -> None:
    seeing = with_faces(pipe, Faces())
    whole, large, small, wide = (
        seeing.encode_reference(picture, **options).pixels
        for options in ({}, {"crop": "face"}, {"crop": "face", "face_index": 1}, {"crop": "face", "margin": 1.0})
    )
    for a, b in ((whole, large), (large, small), (large, wide)):
        assert not torch.equal(a, b)
    wanted = prepare_portrait(picture, 128, crop="face", analyzer=Faces())
    assert torch.equal(large, wanted.pixels)


def test_an_embedding_that_is_given_replaces_the_one_seen(pipe: MemoPipeline, picture: Image.Image) -> None:
    seeing, embedding = with_faces(pipe, Faces()), torch.arange(512.0)
    cropped = seeing.encode_reference(picture, embedding, crop="face")
    assert torch.equal(cropped.face_embedding, embedding[None])
    assert torch.equal(cropped.pixels, seeing.encode_reference(picture, crop="face").pixels)  # still to the face
    kept = cropped.face_embedding.clone()
    embedding.zero_()
    assert torch.equal(cropped.face_embedding, kept)
    # no face is looked for where none is needed
    with_faces(pipe, NoFaces()).encode_reference(picture, torch.zeros(512), no_face="error")


def test_no_face_warns_or_is_an_error(
    pipe: MemoPipeline, picture: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    blind = with_faces(pipe, NoFaces())
    with caplog.at_level(logging.WARNING):
        reference = blind.encode_reference(picture)
    assert reference.face_embedding.eq(0).all() and "no face was found" in caplog.text
    with pytest.raises(PortraitError, match="no face was found"):
        blind.encode_reference(picture, no_face="error")


def test_absent_face_models_are_told_once_and_not_of_an_embedded_checkpoint(
    memo_tiny: Path,
    tmp_path: Path,
    picture: Image.Image,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(memo_tiny, tmp_path / "toon", ignore=shutil.ignore_patterns("expected*"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            reference = MemoPipeline.from_pretrained(folder).encode_reference(picture)
    assert reference.face_embedding.eq(0).all()
    lines = [record.getMessage() for record in caplog.records if "face models" in record.getMessage()]
    assert len(lines) == 1 and f"{folder}/misc/face_analysis/models:" in lines[0]
    caplog.clear()
    monkeypatch.setattr(layout, "assets", lambda: tmp_path)
    _warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        reference = MemoPipeline.from_pretrained("toon").encode_reference(picture)
    assert reference.face_embedding.eq(0).all() and not caplog.records


def test_damaged_face_models_are_an_error(memo_tiny: Path, tmp_path: Path, picture: Image.Image) -> None:
    pytest.importorskip("onnxruntime")
    folder = shutil.copytree(memo_tiny, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("expected*"))
    (folder / FOLDER).mkdir(parents=True)
    for name in (DETECTOR, EMBEDDER):
        (folder / FOLDER / name).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot load .*scrfd"):
        MemoPipeline.from_pretrained(folder).encode_reference(picture)


def test_references_check_their_parts(small: Reference) -> None:
    with pytest.raises(PortraitError, match=r"latents \[1, 4, 8, 8\], received \[4, 8, 8\]"):
        Reference(small.pixels, small.latents[0], small.face_embedding)
    with pytest.raises(PortraitError, match=r"face_embedding \[1, 512\]"):
        Reference(small.pixels, small.latents, small.face_embedding[0])
    with pytest.raises(PortraitError, match="latents hold NaN"):
        Reference(small.pixels, small.latents / 0 * 0, small.face_embedding)


def test_a_reference_is_known_by_its_picture_whatever_computed_its_latents(small: Reference) -> None:
    half = Reference(small.pixels, small.latents.bfloat16().float(), small.face_embedding * 1.0001)
    assert half.digest == small.digest
    pixels = small.pixels.clone()
    pixels[0, 0, 0] -= 0.5
    assert Reference(pixels, small.latents, small.face_embedding).digest != small.digest


# The clip


def test_signature_is_the_documented_one() -> None:
    parameters = inspect.signature(MemoPipeline.sample_clip).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert list(defaults)[:5] == ["self", "ref", "audio", "emotion", "memory"]
    documented = dict(
        start=0, num_frames=None, steps=20, guidance_scale=3.5, seed=42, noise=None, on_progress=None, should_stop=None
    )
    assert {name: defaults[name] for name in documented} == documented


@pytest.fixture(scope="module")
def clip(pipe: MemoPipeline, small: Reference, track: AudioTrack) -> Clip:
    return pipe.sample_clip(small, track, start=3, num_frames=37, steps=1, guidance_scale=1)[0]


def test_a_clip_counts_its_frames(clip: Clip) -> None:
    assert (clip.num_frames, clip.start, clip.fps, clip.stopped) == (37, 3, 30, False)
    assert clip.seconds == pytest.approx(37 / 30) and clip.latents.dtype == torch.float32


def test_a_clip_gives_the_frames_that_were_sampled(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, clip: Clip
) -> None:
    job = pipe.job(small, track, start=3, num_frames=37, steps=1, guidance_scale=1)
    windows = list(pipe.sample_windows(job))
    assert [window.start for window in windows] == [3, 19, 35] and [len(window.frames) for window in windows] == [
        16,
        16,
        5,
    ]
    assert torch.equal(torch.cat([window.latents for window in windows], dim=1), clip.latents)
    frames = clip.to_tensor()
    assert frames.shape == (37, 64, 64, 3) and frames.dtype == torch.float32 and 0 <= frames.min() <= frames.max() <= 1
    assert torch.equal(torch.cat([window.frames for window in windows]).permute(0, 2, 3, 1), frames)
    assert relative_l2(pipe.decode(clip.latents).permute(0, 2, 3, 1), frames) < 1e-5


def test_frames_are_levels_of_eight_bits(clip: Clip) -> None:
    frames, levels = clip.to_tensor(), list(clip.frames())
    assert len(levels) == 37 and all(frame.shape == (64, 64, 3) and frame.dtype == np.uint8 for frame in levels)
    assert np.array_equal(np.stack(levels), (frames * 255).round().numpy().astype(np.uint8))


def test_frames_are_decoded_as_they_are_asked_for(clip: Clip) -> None:
    asked: list[int] = []

    def decode(latents: Tensor) -> Tensor:
        asked.append(latents.shape[1])
        return torch.zeros(latents.shape[1], 3, 8, 8)

    counted = Clip(clip.latents, 0, 30, decode)
    frames = counted.frames()
    assert asked == []
    next(frames)
    assert asked == [16]
    assert sum(1 for _ in frames) == 36 and asked == [16, 16, 5]


# The whole path


def test_a_picture_and_a_recording_become_frames(pipe: MemoPipeline, picture: Image.Image, memo_tiny: Path) -> None:
    waveform, rate = load_audio(memo_tiny / "speech.wav")
    audio = pipe.encode_audio(waveform, rate)
    emotion = pipe.detect_emotion(waveform, rate, audio.num_padded_frames)
    reference = pipe.encode_reference(picture, size=64)
    clip, memory = pipe.sample_clip(reference, audio, emotion, MemoryState.empty(), steps=1)
    assert isinstance(audio, AudioTrack) and isinstance(emotion, EmotionTrack)
    assert clip.num_frames == audio.num_frames == round(waveform.shape[-1] / rate * 30)
    assert memory.windows == -(-clip.num_frames // 16) and memory.model == pipe.nets.digest
    frames = np.stack(list(clip.frames()))
    assert frames.shape == (clip.num_frames, 64, 64, 3) and frames.std() > 1


def test_the_voice_is_heard(pipe: MemoPipeline, small: Reference, track: AudioTrack) -> None:
    silent = AudioTrack(torch.zeros_like(track.embeddings), track.num_frames, track.fps, track.context)
    heard, unheard = (pipe.sample_clip(small, audio, num_frames=16, steps=1)[0].latents for audio in (track, silent))
    assert relative_l2(unheard, heard) > 1e-2


@pytest.mark.parametrize(
    "latents, fps",
    [(torch.zeros(3, 16, 8, 8), 30), (torch.full((4, 1, 8, 8), float("nan")), 30), (torch.zeros(4, 1, 8, 8), 0)],
)
def test_clips_check_their_parts(latents: torch.Tensor, fps: float) -> None:
    with pytest.raises(SamplingError, match="received|hold NaN"):
        Clip(latents, 0, fps, lambda x: x)
