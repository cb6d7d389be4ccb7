"""Sampling: equal to the reference implementation, and what the released code cannot do."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import relative_l2, thinned
from torch import Tensor

from memo_core import AudioTrack, EmotionTrack, MemoPipeline, MemoryState, Reference
from memo_core.errors import MemoryStateError, SamplingError
from memo_core.sampling.noise import window_noise
from memo_core.sampling.renderer import Window
from memo_core.sampling.store import WindowStore
from memo_core.sampling.vae import decode_latents

CHAINED = 1e-4  # relative L2
WINDOWS = 3

Expected = dict[str, Tensor]


@pytest.mark.parametrize("window", range(WINDOWS))
def test_chained_windows_equal_the_reference(chain: list[Window], expected: Expected, window: int) -> None:
    mine = chain[window]
    assert relative_l2(mine.latents, expected[f"clip{window}.latents"][0]) < CHAINED
    # The fixture holds every fourth frame.
    assert relative_l2(mine.frames[::4].transpose(0, 1), expected[f"clip{window}.frames"][0]) < CHAINED
    assert (
        mine.start == 16 * window and mine.latents.shape == (4, 16, 16, 16) and mine.frames.shape == (16, 3, 128, 128)
    )


@pytest.mark.parametrize("window", range(1, WINDOWS))
def test_past_frames_equal_the_reference(chain: list[Window], expected: Expected, window: int) -> None:
    past = chain[window - 1].memory.entries[-1].latents
    assert relative_l2(past, expected[f"clip{window}.reference_latents"][1:17]) < CHAINED


@pytest.mark.slow
def test_forgetting_the_memory_is_seen(
    pipe: MemoPipeline, reference: Reference, track: AudioTrack, emotions: EmotionTrack, expected: Expected
) -> None:
    """The comparison above would notice a lost memory."""
    clip, _ = pipe.sample_clip(
        reference, track, emotions, start=16, num_frames=16, steps=4, noise=expected["clip1.noise"]
    )
    assert relative_l2(clip.latents, expected["clip1.latents"][0]) > 1e-2


def test_seeded_noise_depends_on_seed_and_place_alone(pipe: MemoPipeline, small: Reference, track: AudioTrack) -> None:
    def sample(**options) -> Tensor:
        return pipe.sample_clip(small, track, steps=1, guidance_scale=1, **options)[0].latents

    whole = sample(num_frames=32)
    assert torch.equal(whole[:, :16], sample(num_frames=16))
    assert not torch.equal(whole[:, :16], sample(num_frames=16, seed=43))
    first, second = (window_noise(42, frame, (4, 16, 8, 8)) for frame in (0, 16))
    assert not torch.equal(first, second)
    assert torch.equal(whole, sample(num_frames=32, noise=torch.stack([first, second])))
    above = window_noise(42 + 2**32, 0, (4, 16, 8, 8))
    assert not torch.equal(first, above), "torch's own generator would forget all but 32 bits"


def count_rows(pipe: MemoPipeline, run: Callable[[], object]) -> list[int]:
    """Batch rows of every call of the Diffusion Net."""
    rows: list[int] = []
    hook = pipe.nets.diffusion_net.register_forward_hook(lambda module, given, answer: rows.append(len(answer)))
    try:
        run()
    finally:
        hook.remove()
    return rows


def test_without_guidance_one_row_is_computed(pipe: MemoPipeline, small: Reference, track: AudioTrack) -> None:
    options = dict(num_frames=16, steps=2)
    assert count_rows(pipe, lambda: pipe.sample_clip(small, track, guidance_scale=1, **options)) == [1, 1]
    assert count_rows(pipe, lambda: pipe.sample_clip(small, track, guidance_scale=2, **options)) == [2, 2]


def test_guidance_of_one_is_the_limit_of_guidance(
    pipe: MemoPipeline, reference: Reference, track: AudioTrack, emotions: EmotionTrack
) -> None:
    def sample(guidance_scale: float) -> Tensor:
        return pipe.sample_clip(
            reference, track, emotions, num_frames=16, steps=1, guidance_scale=guidance_scale, face_token_rows="grouped"
        )[0].latents

    alone = sample(1)
    assert relative_l2(sample(1 + 1e-6), alone) < 1e-5
    assert relative_l2(sample(3.5), alone) > 1e-3


def test_face_token_rows_are_a_choice(pipe: MemoPipeline, small: Reference, track: AudioTrack) -> None:
    first, second = (
        pipe.sample_clip(small, track, num_frames=16, steps=1, face_token_rows=rows)[0].latents
        for rows in ("released", "grouped")
    )
    assert 1e-4 < relative_l2(second, first) < 1


@pytest.mark.parametrize(
    "size", thinned([(64, 128), (128, 64), (192, 64)], fast=[(128, 64)]), ids=lambda size: "x".join(map(str, size))
)
def test_pictures_need_not_be_square(
    pipe: MemoPipeline, expected: Expected, track: AudioTrack, size: tuple[int, int]
) -> None:
    height, width = size
    image = expected["in.reference_image"][0].repeat(1, 2, 2)[:, :height, :width]
    reference = pipe.encode_reference(image, expected["in.face_embedding"])
    clip, memory = pipe.sample_clip(reference, track, num_frames=20, steps=1)
    assert clip.latents.shape == (4, 20, height // 8, width // 8)
    frames = clip.to_tensor()
    assert frames.shape == (20, height, width, 3) and torch.isfinite(frames).all()
    assert memory.entries[-1].latents.shape == (4, 4, height // 8, width // 8)


def test_a_window_may_begin_at_any_frame(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, emotions: EmotionTrack
) -> None:
    """Frame 5 of a recording is frame 0 of the recording without its first five frames."""
    noise = torch.randn(2, 4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    options = dict(num_frames=25, steps=1, noise=noise, emotion_per="frame")
    later, _ = pipe.sample_clip(small, track, emotions, start=5, **options)
    cut = AudioTrack(track.embeddings[5:], track.num_frames - 5, track.fps, track.context)
    labels = EmotionTrack(emotions.labels[5:], emotions.probabilities, emotions.segment_starts, emotions.fps)
    first, _ = pipe.sample_clip(small, cut, labels, **options)
    assert torch.equal(later.latents, first.latents)
    assert later.start == 5 and first.start == 0
    aligned, _ = pipe.sample_clip(small, track, emotions, **options)
    assert not torch.equal(aligned.latents, first.latents)


@pytest.mark.parametrize("start", [5, 60])
def test_up_to_the_end_from_any_frame(pipe: MemoPipeline, small: Reference, track: AudioTrack, start: int) -> None:
    """The last window may reach beyond the padded audio; it hears the padding's last frame there."""
    clip, memory = pipe.sample_clip(small, track, start=start, steps=1, guidance_scale=1)
    assert clip.num_frames == 69 - start and not clip.stopped
    assert memory.windows == -(-(69 - start) // 16)


def test_a_partial_window_is_the_beginning_of_a_whole_one(
    pipe: MemoPipeline, small: Reference, track: AudioTrack
) -> None:
    whole, _ = pipe.sample_clip(small, track, num_frames=32, steps=1)
    part, memory = pipe.sample_clip(small, track, num_frames=20, steps=1)
    assert torch.equal(part.latents, whole.latents[:, :20])
    assert [len(entry.latents) for entry in memory.entries] == [16, 16, 4]
    assert [entry.weight for entry in memory.entries] == pytest.approx([0.9**20, 0.9**4, 1])
    onward, after = pipe.sample_clip(small, track, memory=memory, start=20, num_frames=16, steps=1)
    assert torch.isfinite(onward.latents).all() and after.windows == 3
    forgetful, _ = pipe.sample_clip(small, track, start=20, num_frames=16, steps=1)
    assert relative_l2(onward.latents, forgetful.latents) > 1e-3


def test_a_window_has_the_emotion_of_most_of_its_frames(
    pipe: MemoPipeline, small: Reference, track: AudioTrack
) -> None:
    def sample(emotion: EmotionTrack | None, per: str) -> Tensor:
        return pipe.sample_clip(small, track, emotion, num_frames=16, steps=1, emotion_per=per)[0].latents

    happy = EmotionTrack.constant("happy", 80)
    mostly = happy.with_label(0, 7 / 30, "sad")
    assert torch.equal(sample(mostly, "window"), sample(happy, "window"))
    assert not torch.equal(sample(happy, "window"), sample(EmotionTrack.constant("sad", 80), "window"))
    assert not torch.equal(sample(happy, "window"), sample(None, "window"))


@pytest.mark.slow
def test_each_frame_may_have_its_own_emotion(pipe: MemoPipeline, reference: Reference, track: AudioTrack) -> None:
    def sample(emotion: EmotionTrack, per: str) -> Tensor:
        return pipe.sample_clip(reference, track, emotion, num_frames=16, steps=1, emotion_per=per)[0].latents

    happy = EmotionTrack.constant("happy", 80)
    constant = sample(happy, "frame")
    assert relative_l2(constant, sample(happy, "window")) < 1e-5
    changed = sample(happy.with_label(0, 4 / 30, "sad"), "frame")
    # Per frame; the others feel it through attention over time.
    difference = (changed - constant).square().sum((0, 2, 3))
    assert difference[:4].mean() > 5 * difference[4:].mean() > 0


def test_progress_counts_every_step(pipe: MemoPipeline, small: Reference, track: AudioTrack) -> None:
    calls: list[tuple[int, int]] = []
    pipe.sample_clip(
        small, track, num_frames=33, steps=2, guidance_scale=1, on_progress=lambda *call: calls.append(call)
    )
    assert calls == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    "asked, windows",
    [(4, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (5, 2), (6, 2)))],
)
def test_stopping_keeps_the_finished_windows(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, asked: int, windows: int
) -> None:
    """Two steps a window: the question is put before each."""
    options = dict(steps=2, guidance_scale=1)
    answers = iter([False] * (asked - 1) + [True])
    clip, memory = pipe.sample_clip(small, track, num_frames=48, should_stop=lambda: next(answers), **options)
    assert clip.stopped and clip.num_frames == 16 * windows and memory.windows == windows
    assert clip.to_tensor().shape == (16 * windows, 64, 64, 3) and len(list(clip.frames())) == 16 * windows
    whole, after = pipe.sample_clip(small, track, num_frames=48, **options)
    rest, resumed = pipe.sample_clip(
        small, track, memory=memory, start=clip.num_frames, num_frames=48 - clip.num_frames, **options
    )
    assert not whole.stopped and not rest.stopped
    assert torch.equal(torch.cat([clip.latents, rest.latents], dim=1), whole.latents)
    assert resumed.digest == after.digest


def test_an_edit_changes_only_what_follows(pipe: MemoPipeline, small: Reference, track: AudioTrack) -> None:
    happy = EmotionTrack.constant("happy", 80)
    edited = happy.with_label(34 / 30, 48 / 30, "angry")
    before, after = (
        pipe.sample_clip(small, track, emotion, num_frames=48, steps=1)[0].latents for emotion in (happy, edited)
    )
    assert torch.equal(before[:, :32], after[:, :32]) and not torch.equal(before[:, 32:], after[:, 32:])


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(steps=0), "steps .* received 0"),
        (dict(steps=2.5), "steps .* received 2.5"),
        (dict(guidance_scale=0.5), "guidance_scale .* received 0.5"),
        (dict(guidance_scale=float("nan")), "guidance_scale .* received nan"),
        (dict(guidance_scale="high"), "guidance_scale .* received 'high'"),
        (dict(seed=-1), "seed .* received -1"),
        (dict(emotion_per="second"), "emotion_per .* received 'second'"),
        (dict(face_token_rows="none"), "face_token_rows .* received 'none'"),
        (dict(start=69), "start .* 0 to 68 .* received 69"),
        (dict(start=-1), "start .* received -1"),
        (dict(num_frames=0), "num_frames .* 1 to 69 .* received 0"),
        (dict(start=60, num_frames=10), "num_frames .* 1 to 9 .* received 10"),
        (dict(num_frames=17, noise=torch.zeros(1, 4, 16, 8, 8)), r"\[2, 4, 16, 8, 8\] .* received \[1, 4, 16, 8, 8\]"),
        (dict(num_frames=16, noise=torch.zeros(4, 16, 8, 8)), r"received \[4, 16, 8, 8\]"),
        (dict(num_frames=16, noise=torch.full((1, 4, 16, 8, 8), float("nan"))), "noise holds NaN"),
    ],
)
def test_bad_arguments_are_named(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, options: dict, named: str
) -> None:
    with pytest.raises(SamplingError, match=named):
        pipe.sample_clip(small, track, **options)


def test_values_that_do_not_fit_each_other_are_refused(
    pipe: MemoPipeline, small: Reference, reference: Reference, track: AudioTrack
) -> None:
    with pytest.raises(SamplingError, match="emotion track has 68 frames, the audio 69"):
        pipe.sample_clip(small, track, EmotionTrack.constant("happy", 68))
    other = dataclasses.replace(track, embeddings=track.embeddings[..., :31])
    with pytest.raises(SamplingError, match=r"reads 320 speech features per frame, .* \[5, 2, 31\]"):
        pipe.sample_clip(small, other)
    _, memory = pipe.sample_clip(small, track, num_frames=16, steps=1, guidance_scale=1)
    with pytest.raises(MemoryStateError, match=f"reference {small.digest}.*{reference.digest}"):
        pipe.sample_clip(reference, track, memory=memory)
    foreign = MemoryState.empty().push(torch.zeros(16, 4, 8, 8), torch.zeros(1, 512), "a" * 16, small.digest)
    with pytest.raises(MemoryStateError, match=f"checkpoint {'a' * 16}.*{pipe.nets.digest}"):
        pipe.sample_clip(small, track, memory=foreign)


def test_a_network_that_overflows_is_reported(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = pipe.nets.diffusion_net.conv_out.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, float("inf")))
    with pytest.raises(SamplingError, match="NaN or infinite values in torch.float32"):
        pipe.sample_clip(small, track, num_frames=16, steps=1)


# --- Pictures that are not finite though their latents are ------------------------------------------------------------


@pytest.fixture
def bad_decoder(pipe: MemoPipeline, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the VAE's decoder spoil a pixel of some of the pictures it is given from now on, counted from 0."""

    def spoil(value: float, *numbers: int) -> None:
        decode, count = pipe.nets.vae.decode, itertools.count()

        def decoded(latents: Tensor, return_dict: bool) -> tuple[Tensor]:
            pictures = decode(latents, return_dict=return_dict)[0].clone()
            for picture in pictures:
                if next(count) in numbers:
                    picture[0, 3, 5] = value
            return (pictures,)

        monkeypatch.setattr(pipe.nets.vae, "decode", decoded)

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_frames_that_are_not_finite_are_refused_before_they_are_kept(
    pipe: MemoPipeline,
    small: Reference,
    track: AudioTrack,
    bad_decoder: Callable[..., None],
    value: float,
    tmp_path: Path,
) -> None:
    bad_decoder(value, 16 + 2, 16 + 9)
    store, seen = WindowStore(tmp_path), []
    job = pipe.job(small, track, num_frames=32, steps=1, guidance_scale=1)
    wanted = r"window from frame 16 on the VAE .* torch.float32 .* 2 frames, 2 to 9, of 16"
    with pytest.raises(SamplingError, match=wanted):
        seen.extend(window.start for window in pipe.sample_windows(job, store=store))
    assert seen == [0]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1, "the first window alone"


def test_stored_windows_that_cannot_be_decoded_are_refused(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, bad_decoder: Callable[..., None], tmp_path: Path
) -> None:
    store, job = WindowStore(tmp_path), pipe.job(small, track, start=7, num_frames=20, steps=1, guidance_scale=1)
    list(pipe.sample_windows(job, store=store))
    bad_decoder(float("nan"), 16)
    first, second = pipe.sample_windows(job, store=store)
    assert first.stored and second.stored and torch.isfinite(first.frames).all()
    with pytest.raises(SamplingError, match="window from frame 23 on the VAE .* frame 0 of 4"):
        _ = second.frames


def test_clips_that_cannot_be_decoded_are_refused(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, bad_decoder: Callable[..., None]
) -> None:
    clip, _ = pipe.sample_clip(small, track, num_frames=16, steps=1, guidance_scale=1)
    bad_decoder(float("nan"), *range(100))
    with pytest.raises(SamplingError, match="16 frames, 0 to 15, of 16"):
        clip.to_tensor()
    with pytest.raises(SamplingError, match="NaN or infinite"):
        next(clip.frames())


def test_a_vae_that_overflows_in_float16_is_named(pipe: MemoPipeline) -> None:
    class Overflowing:
        config, device = pipe.nets.vae.config, torch.device("cpu")
        decoder = torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(4, 8, 3)}).half()

        def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (latents.new_full((len(latents), 3, 64, 64), 65504) * 2,)

    with pytest.raises(
        SamplingError, match="torch.float16 .* released VAE overflows in float16: use float32 or bfloat16"
    ):
        decode_latents(Overflowing(), torch.zeros(4, 2, 8, 8))


def test_a_portrait_that_cannot_be_encoded_is_refused(pipe: MemoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = pipe.nets.vae.quant_conv.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, float("nan")))
    with pytest.raises(SamplingError, match="when encoding frame 0 of 1"):
        pipe.encode_reference(torch.zeros(3, 64, 64))
