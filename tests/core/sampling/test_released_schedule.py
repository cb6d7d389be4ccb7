"""The released schedule, the yardstick of every speed: it gives the numbers of the reference and of memo_core."""

from __future__ import annotations

import pytest
import torch
from common import relative_l2
from torch import Tensor

from benchmarks import released
from benchmarks.timing import Parts
from memo_core import AudioTrack, EmotionTrack, MemoPipeline, MemoryState, Reference
from memo_core.sampling.renderer import Window

CHAINED = 1e-4  # relative L2
WINDOWS, STEPS = 3, 4


@pytest.fixture(scope="module")
def job(
    pipe: MemoPipeline,
    reference: Reference,
    track: AudioTrack,
    emotions: EmotionTrack,
    expected: dict[str, Tensor],
):
    noise = torch.cat([expected[f"clip{i}.noise"] for i in range(WINDOWS)])
    return pipe.job(reference, track, emotions, num_frames=16 * WINDOWS, steps=STEPS, noise=noise)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts()


@pytest.fixture(scope="module")
def released_chain(pipe: MemoPipeline, job, parts: Parts) -> list[released.ReleasedWindow]:
    return list(released.sample_released(pipe.nets, job, parts))


@pytest.mark.parametrize("window", range(WINDOWS))
@pytest.mark.slow
def test_it_equals_the_reference(released_chain, expected: dict[str, Tensor], window: int) -> None:
    assert relative_l2(released_chain[window].latents, expected[f"clip{window}.latents"][0]) < CHAINED
    # The fixture holds every fourth frame.
    frames = released_chain[window].frames[::4].transpose(0, 1)
    assert relative_l2(frames, expected[f"clip{window}.frames"][0]) < CHAINED


@pytest.mark.slow
def test_it_equals_memo_core(chain: list[Window], released_chain) -> None:
    for mine, theirs in zip(chain, released_chain, strict=True):
        assert relative_l2(mine.latents, theirs.latents) < CHAINED
        assert relative_l2(mine.frames, theirs.frames) < CHAINED


@pytest.mark.slow
def test_it_does_the_released_work(parts: Parts, released_chain, pipe: MemoPipeline) -> None:
    """Counts of what runs: past frames are projected at every step, every frame passes the VAE by itself."""
    counts = parts.counts()
    layers = sum(hasattr(block, "motion_modules") * len(block.resnets) for block in blocks(pipe))
    assert counts[released.REFERENCE_NET] == WINDOWS and counts[released.DIFFUSION_STEP] == WINDOWS * STEPS
    assert counts[released.MEMORY_INPUTS] >= 2 * layers * WINDOWS * STEPS


def blocks(pipe: MemoPipeline) -> list:
    net = pipe.nets.diffusion_net
    return [*net.down_blocks, *net.up_blocks]


@pytest.mark.slow
def test_frames_pass_the_vae_one_by_one(pipe: MemoPipeline, small: Reference, track: AudioTrack) -> None:
    rows: dict[str, list[int]] = {"encoder": [], "decoder": []}
    hooks = [
        getattr(pipe.nets.vae, name).register_forward_pre_hook(
            lambda module, given, name=name: rows[name].append(len(given[0]))
        )
        for name in rows
    ]
    try:
        list(released.sample_released(pipe.nets, pipe.job(small, track, num_frames=16, steps=1)))
    finally:
        for hook in hooks:
            hook.remove()
    assert rows == {"encoder": [1] * 17, "decoder": [1] * 16}


@pytest.mark.parametrize(
    "options",
    [
        dict(guidance_scale=1),
        dict(emotion_per="frame"),
        dict(face_token_rows="grouped"),
        dict(memory=MemoryState.empty(horizon=1)),
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_released_code_cannot_do_is_refused(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, options: dict
) -> None:
    with pytest.raises(ValueError, match="released schedule needs guidance"):
        next(released.sample_released(pipe.nets, pipe.job(small, track, num_frames=16, steps=1, **options)))
