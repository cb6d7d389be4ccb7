"""What does not change is computed once: work is counted here; that the numbers stay equal, test_sampling shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from common import relative_l2, thinned
from torch import Tensor, nn

from memo_core import AudioTrack, EmotionTrack, MemoPipeline, Reference
from memo_core.memory.cache import MemoryCache
from memo_core.nets.conditions import Conditions
from memo_core.nets.past import Memory
from memo_core.sampling.conditions import Conditioner
from memo_core.sampling.settings import Settings
from memo_core.sampling.window import sample_window


@contextmanager
def rows_through(modules: dict[str, nn.Module]) -> Iterator[Counter]:
    """Counts the batch rows that pass each module."""
    rows: Counter = Counter()

    def hook(name: str):
        return lambda module, given, answer: rows.update({name: len(given[0])})

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def constants(pipe: MemoPipeline) -> dict[str, nn.Module]:
    """Layers that see nothing but what is the same at every step of a window."""
    net = pipe.nets.diffusion_net
    face, feelings, shifts = [], [], []
    for name, module in net.named_modules():
        face += [(name, module)] * (name.endswith(("attn2.to_k", "attn2.to_v")) and ".attentions." in name)
        feelings += [(name, module)] * name.endswith(("embedding_table", "adaLN_modulation.1"))
        shifts += [(name, module)] * name.endswith("time_emb_proj")
    first = net.down_blocks[0].audio_modules[0].transformer_blocks[0]
    heard = {"first hearing": first.audio_attn1, "its projection": first.attn2.add_k_proj}
    return dict(face + feelings + shifts) | heard | {"time": net.time_embedding.linear_1}


def test_constants_are_computed_once_a_window(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, emotions: EmotionTrack
) -> None:
    """However many steps there are, every layer that sees only constants is called once a window."""
    calls: Counter = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in constants(pipe).items()
    ]
    try:
        pipe.sample_clip(small, track, emotions, num_frames=16, steps=3)
    finally:
        for handle in handles:
            handle.remove()
    assert set(calls) == set(constants(pipe)) and set(calls.values()) == {1}


def test_the_portrait_is_projected_once_for_all_frames_and_steps(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, emotions: EmotionTrack
) -> None:
    attention = pipe.nets.diffusion_net.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    counted = []
    for steps in (1, 4):
        with rows_through({"k": attention.to_k}) as rows:
            pipe.sample_clip(small, track, emotions, num_frames=16, steps=steps)
        counted.append(rows["k"])
    # 2 rows: as released, frames see the portrait with and without the face's tokens in turn.
    assert counted == [2 + 32, 2 + 4 * 32]


def test_the_memory_is_projected_once_a_window(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, emotions: EmotionTrack
) -> None:
    block = pipe.nets.diffusion_net.down_blocks[0].motion_modules[0].temporal_transformer
    counted = []
    for steps in (1, 4):
        pipe._memory.clear()
        with rows_through({"in": block.proj_in}) as rows:
            pipe.sample_clip(small, track, emotions, num_frames=16, steps=steps)
        counted.append(rows["in"])
    assert counted == [2 + 32, 2 + 4 * 32]


def test_initial_past_frames_are_looked_at_once(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, emotions: EmotionTrack
) -> None:
    """The portrait held still for 16 frames is one picture, once with the face's tokens and once without."""
    pipe._memory.clear()
    with rows_through({"net": pipe.nets.reference_net}) as rows:
        pipe.sample_clip(small, track, emotions, num_frames=32, steps=1)
    portrait, held_still, past_frames = 2, 2, 32
    assert rows["net"] == portrait + held_still + past_frames


def test_rows_are_one_until_they_differ(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, emotions: EmotionTrack
) -> None:
    """Before the first attention, rows with and without conditions are the same frames."""
    net = pipe.nets.diffusion_net
    with rows_through({"in": net.conv_in, "first": net.down_blocks[0].resnets[0], "out": net.conv_out}) as rows:
        pipe.sample_clip(small, track, emotions, num_frames=16, steps=1)
    assert rows == {"in": 16, "first": 16, "out": 32}


def given(
    pipe: MemoPipeline, reference: Reference, track: AudioTrack, emotions: EmotionTrack
) -> tuple[Conditions, list[Memory], Tensor]:
    job = pipe.job(reference, track, emotions, num_frames=16)
    inputs = job.inputs(0, job.entering(pipe.nets))
    with torch.no_grad():
        conditioner = Conditioner(pipe.nets, reference, Settings(), MemoryCache())
        conditions, memory = conditioner.conditions(inputs), list(conditioner.memory(inputs.memory))
    return conditions, memory, torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("row_by_row", thinned([False, True], fast=[False]), ids=["together", "row by row"])
def test_several_videos_at_once_are_the_same_videos(
    pipe: MemoPipeline, reference: Reference, track: AudioTrack, emotions: EmotionTrack, row_by_row: bool
) -> None:
    conditions, memory, noise = given(pipe, reference, track, emotions)
    other = noise.flip(2)
    both = Conditions(
        reference=[torch.cat([feature, feature]) for feature in conditions.reference],
        face_tokens=conditions.face_tokens.repeat_interleave(2, dim=0),
        audio_tokens=conditions.audio_tokens.repeat_interleave(2, dim=0),
        emotion=conditions.emotion.repeat_interleave(2, dim=0),
        frames=16,
    )
    of_both = [tuple(part.repeat_interleave(2, dim=0) for part in pair) for pair in memory]
    settings = Settings(steps=1)
    together = sample_window(pipe.nets, torch.cat([noise, other]), both, of_both, settings, row_by_row=row_by_row)
    for mine, alone in zip(together, (noise, other)):
        assert relative_l2(mine[None], sample_window(pipe.nets, alone, conditions, memory, settings)) < 1e-5
