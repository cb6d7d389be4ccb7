"""Guidance's two rows on two threads: the same numbers, and nothing of it is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from common import relative_l2

from memo_core import AudioTrack, EmotionTrack, MemoPipeline, Reference
from memo_core.nets.layers import attention_fused, attention_is_fused
from memo_core.running.options import Options
from memo_core.running.parallel import run_in_parallel
from memo_core.sampling.vae import decode_latents, encode_frames


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_rows_on_threads_are_the_same_rows(
    memo_tiny: Path, pipe: MemoPipeline, reference: Reference, track: AudioTrack, emotions: EmotionTrack
) -> None:
    seen = set()
    other = MemoPipeline.from_pretrained(memo_tiny, options=Options(rows_on_threads=True))
    other.nets.diffusion_net.register_forward_hook(lambda *_: seen.add(threading.current_thread().name))
    settings = dict(num_frames=16, steps=1)
    mine, wanted = (each.sample_clip(reference, track, emotions, **settings)[0].latents for each in (other, pipe))
    assert len(seen) == 2 and relative_l2(mine, wanted) < 1e-5
    assert torch.equal(mine, other.sample_clip(reference, track, emotions, **settings)[0].latents)


def test_frames_of_the_vae_on_threads_are_the_same_frames(pipe: MemoPipeline) -> None:
    vae, latents = pipe.nets.vae, torch.randn(4, 13, 8, 8, generator=torch.Generator().manual_seed(0))
    where: set[str] = set()
    hook = vae.decoder.register_forward_hook(lambda *_: where.add(threading.current_thread().name))
    with torch.inference_mode():
        frames = decode_latents(vae, latents)
        assert len(where) == 1
        mine = decode_latents(vae, latents, on_threads=True)
        assert relative_l2(mine, frames) < 1e-5 and len(where) == 3
        assert torch.equal(mine, decode_latents(vae, latents, on_threads=True))
        means = encode_frames(vae, frames * 2 - 1)
        assert relative_l2(encode_frames(vae, frames * 2 - 1, on_threads=True), means) < 1e-5
    hook.remove()


def test_each_task_has_its_share_of_the_threads_and_the_callers_modes() -> None:
    def modes() -> tuple[int, bool, bool]:
        return torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert run_in_parallel([modes, modes]) == [(1, True, False)] * 2
    with torch.no_grad():
        assert run_in_parallel([modes, modes]) == [(1, False, False)] * 2
    with torch.inference_mode():
        assert run_in_parallel([modes, modes]) == [(1, False, True)] * 2
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert run_in_parallel([threading.get_ident] * 2) == [threading.get_ident()] * 2


def test_tasks_see_the_callers_context() -> None:
    with attention_fused(False):
        assert run_in_parallel([lambda: attention_is_fused(torch.device("cpu"))] * 2) == [False] * 2


def test_an_error_in_a_task_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        run_in_parallel([lambda: 1, lambda: 1 // 0])
    assert torch.get_num_threads() == 2 and run_in_parallel([lambda: 1, lambda: 2]) == [1, 2]
