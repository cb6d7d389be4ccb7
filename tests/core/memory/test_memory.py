"""MemoryState: its laws value, split, resume and constant, what its operations claim, and its file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import FIXTURES, examples, relative_l2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from memo_core import AudioTrack, MemoPipeline, MemoryState, Reference
from memo_core.errors import MemoryStateError
from memo_core.kernels import memory_sums
from memo_core.memory.cache import MemoryCache
from memo_core.memory.state import MOST_WINDOWS, MemoryEntry
from memo_core.nets.past import LinearSums
from memo_core.release import DECAY
from memo_core.running.precision import HALF

FACE = torch.ones(1, 512)
MODEL, PORTRAIT = "0123456789abcdef", "fedcba9876543210"
FADED = DECAY**96 / (1 - DECAY)  # at most, of windows of a frame each before the last 96
MIB = 2**20

frame_counts = st.lists(st.integers(1, 16), min_size=1, max_size=20)
full_windows = st.integers(1, 20).map(lambda windows: [16] * windows)
pasts = full_windows | frame_counts
seeds = st.integers(0, 2**32)


def window(frames: int, seed: int, side: int = 2) -> Tensor:
    return torch.randn(frames, 4, side, side, generator=torch.Generator().manual_seed(seed))


def push(state: MemoryState, frames: int, seed: int, side: int = 2) -> MemoryState:
    return state.push(window(frames, seed, side), FACE, MODEL, PORTRAIT)


def make(counts: list[int], seed: int = 0, horizon: int | None = None) -> MemoryState:
    state = MemoryState.empty(horizon)
    for i, frames in enumerate(counts):
        state = push(state, frames, seed + i)
    return state


LAYER = SimpleNamespace(carries=LinearSums())


def past_of(entry: MemoryEntry) -> list[tuple[SimpleNamespace, Tensor, Tensor]]:
    """Of one temporal layer, with the latents as keys and values, in double precision."""
    tokens = entry.latents.double().flatten(2).transpose(1, 2)[None, :, :, None]  # [1, F, N, 1, 4]
    return [(LAYER, tokens, tokens.flip(-1))]


def sums_of(entry: MemoryEntry) -> tuple[Tensor, Tensor]:
    ((_, key, value),) = past_of(entry)
    return memory_sums(key, value)


def sums(state: MemoryState, cache: MemoryCache | None = None) -> tuple[Tensor, Tensor]:
    return (cache or MemoryCache()).memory_of(state, "", past_of)[0]


def recurrence(counts: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """M <- 0.9^F M + sum k v^T and Z likewise, as the paper has it, over everything that ever was."""
    kv, z = torch.zeros(1, 4, 1, 4, 4).double(), torch.zeros(1, 4, 1, 4).double()
    for i, frames in enumerate(counts):
        new_kv, new_z = sums_of(MemoryEntry(window(frames, seed + i), FACE))
        kv, z = DECAY**frames * kv + new_kv, DECAY**frames * z + new_z
    return kv, z


def same_entries(a: MemoryState, b: MemoryState) -> bool:
    return a.digest == b.digest and all(
        x.weight == y.weight and torch.equal(x.latents, y.latents) and torch.equal(x.face_embedding, y.face_embedding)
        for x, y in zip(a.entries, b.entries, strict=True)
    )


# What the sums are


@given(pasts, seeds)
def test_sums_follow_the_recurrence_but_for_what_has_faded(counts: list[int], seed: int) -> None:
    each = [sums_of(MemoryEntry(window(frames, seed + i), FACE)) for i, frames in enumerate(counts)]
    for mine, exact, windows in zip(sums(make(counts, seed)), recurrence(counts, seed), zip(*each)):
        largest = max(float(part.norm()) for part in windows)
        assert (mine - exact).norm() <= 1e-8 * exact.norm() + FADED * largest
        assert sum(counts) > 96 or relative_l2(mine, exact) < 1e-8


@given(frame_counts, seeds, st.integers(1, 5))
def test_a_horizon_remembers_the_last_windows_alone(counts: list[int], seed: int, horizon: int) -> None:
    state = make(counts, seed, horizon)
    last = counts[-horizon:]
    skipped = len(counts) - len(last)
    for mine, exact in zip(sums(state), recurrence(last, seed + skipped)):
        assert relative_l2(mine, exact) < 1e-8
    assert state.windows == len(counts) and len(state.entries) == len(last)


@given(pasts, seeds)
def test_cached_sums_have_the_bits_of_rebuilt_ones(counts: list[int], seed: int) -> None:
    cache, state = MemoryCache(), MemoryState.empty()
    for i, frames in enumerate(counts):
        state = push(state, frames, seed + i)
        for kept, rebuilt in zip(sums(state, cache), sums(state)):
            assert torch.equal(kept, rebuilt)


def test_going_on_computes_one_window_and_what_left_is_not_in_the_sums() -> None:
    calls: list[str] = []

    def counted(entry: MemoryEntry) -> list[tuple[SimpleNamespace, Tensor, Tensor]]:
        calls.append(entry.digest)
        return past_of(entry)

    cache, state, computed = MemoryCache(), MemoryState.empty(), []
    for i in range(9):
        state = push(state, 16, i)
        calls.clear()
        cache.memory_of(state, "", counted)
        computed.append(len(calls))
    assert computed == [1, 1, 1, 1, 1, 1, 1, 6, 1]  # the eighth window makes two leave
    calls.clear()
    cache.memory_of(state, "other settings", counted)
    assert len(calls) == 7


def test_the_cache_is_not_changed_by_who_reads_it() -> None:
    cache, state = MemoryCache(), make([16, 16])
    first = [part.clone() for part in sums(state, cache)]
    faded = sums(state.decayed(1), cache)
    assert all(torch.equal(a, b) for a, b in zip(sums(state, cache), first))
    assert relative_l2(faded[0], first[0] * DECAY**30) < 1e-12


# The laws, on states alone


@given(pasts, pasts, seeds)
def test_split(first: list[int], second: list[int], seed: int) -> None:
    at_once = make(first + second, seed)
    in_two = make(first, seed)
    for i, frames in enumerate(second):
        in_two = push(in_two, frames, seed + len(first) + i)
    assert same_entries(at_once, in_two) and at_once.windows == in_two.windows


@given(pasts, seeds)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resume(tmp_path: Path, counts: list[int], seed: int) -> None:
    state = make(counts, seed).decayed(0.5)
    state.save(tmp_path / "state")
    loaded = MemoryState.load(tmp_path / "state")
    assert same_entries(loaded, state)
    assert (loaded.windows, loaded.horizon, loaded.model, loaded.reference) == (state.windows, None, MODEL, PORTRAIT)
    assert same_entries(push(loaded, 16, seed - 1), push(state, 16, seed - 1))


@given(st.lists(st.integers(1, 16), min_size=0, max_size=300), seeds)
@settings(max_examples=examples(20, fast=5))
def test_constant(counts: list[int], seed: int) -> None:
    state = make([16] * 9 + counts, seed)
    assert 96 <= sum(len(entry.latents) for entry in state.entries) <= 112
    assert state.windows == 9 + len(counts)


def test_at_512_a_state_weighs_at_most_8_mib(tmp_path: Path) -> None:
    whole = MemoryState.empty()
    for i in range(7):
        whole = push(whole, 16, i, side=64)
    shattered = MemoryState.empty()
    for i in range(114):
        shattered = push(shattered, 1, i, side=64)
    assert len(whole.entries) == 7
    for state in (whole, shattered, MemoryState.blend(whole, shattered, 0.5)):
        state.save(tmp_path / "state")
        assert 6 * MIB < state.nbytes <= (tmp_path / "state").stat().st_size <= 8 * MIB


# In half precision


def push_half(state: MemoryState, frames: int, seed: int, side: int = 2, dtype: torch.dtype = HALF[0]) -> MemoryState:
    return state.push(window(frames, seed, side).to(dtype), FACE, MODEL, PORTRAIT)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_in_half_precision_a_file_keeps_every_bit_and_says_which_version_it_is(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    half = MemoryState.empty()
    for seed in range(9):
        half = push_half(half, 16, seed, dtype=dtype)
    mixed = push(half, 16, 9)
    for name, state, version in (("half", half, "2"), ("mixed", mixed, "2"), ("full", make([16, 5]), "1")):
        state.save(tmp_path / name)
        loaded = MemoryState.load(tmp_path / name)
        assert same_entries(loaded, state)
        assert [e.latents.dtype for e in loaded.entries] == [e.latents.dtype for e in state.entries]
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata()["version"] == version
    assert {entry.latents.dtype for entry in half.entries} == {dtype}


def test_in_half_precision_at_512_a_state_weighs_at_most_8_mib_too(tmp_path: Path) -> None:
    whole, shattered, mixed = MemoryState.empty(), MemoryState.empty(), MemoryState.empty()
    most = 0
    for i in range(30):
        whole = push_half(whole, 16, i, side=64)
        mixed = (push if i % 3 else push_half)(mixed, 16, i, side=64)
        most = max(most, len(whole.entries))
        assert max(whole.nbytes, mixed.nbytes) <= 8 * MIB
    for i in range(230):
        shattered = push_half(shattered, 1, i, side=64)
        assert shattered.nbytes <= 8 * MIB
    assert most == MOST_WINDOWS
    whole.save(tmp_path / "state")
    assert (tmp_path / "state").stat().st_size <= 8 * MIB


@pytest.mark.parametrize(("dtype", "passes"), [(torch.float32, 3.5), (torch.bfloat16, 12 / 7)], ids=str)
def test_how_many_windows_are_looked_at_for_each_new_one(dtype: torch.dtype, passes: float) -> None:
    """On the average over a long video; and wherever the sums come from, they are the same bits."""
    state, cache, looked = MemoryState.empty(), MemoryCache(), []

    def counted(entry: MemoryEntry) -> list[tuple[SimpleNamespace, Tensor, Tensor]]:
        looked.append(entry.digest)
        return past_of(entry)

    each = []
    for seed in range(7 * 16):
        state = state.push(window(16, seed).to(dtype), FACE, MODEL, PORTRAIT)
        looked.clear()
        ((kv, z),) = cache.memory_of(state, "", counted)
        each.append(len(looked))
        ((wanted_kv, wanted_z),) = MemoryCache().memory_of(state, "", past_of)
        assert torch.equal(kv, wanted_kv) and torch.equal(z, wanted_z)
    assert sum(each[16:]) / len(each[16:]) == pytest.approx(passes, rel=0.02)
    assert sorted(set(each)) == [1, 6]


@given(pasts, pasts, seeds)
def test_value(counts: list[int], others: list[int], seed: int) -> None:
    state, other = make(counts, seed), make(others, seed + 100)
    before = [(entry.latents.clone(), entry.weight) for entry in state.entries], state.digest, state.windows
    push(state, 16, seed), state.decayed(1), state.inspect(), sums(state)
    MemoryState.blend(state, other, 0.3), MemoryState.blend(other, state, 0.3)
    after = [(entry.latents, entry.weight) for entry in state.entries], state.digest, state.windows
    assert before[1:] == after[1:]
    assert all(torch.equal(a, b) and x == y for (a, x), (b, y) in zip(before[0], after[0], strict=True))


def test_a_state_is_frozen_and_keeps_its_values_when_the_given_tensor_changes() -> None:
    given_latents = window(16, 0)
    state = MemoryState.empty().push(given_latents, FACE, MODEL, PORTRAIT)
    kept = state.entries[0].latents.clone()
    given_latents.zero_()
    assert torch.equal(state.entries[0].latents, kept)
    with pytest.raises(AttributeError):
        state.horizon = 1  # type: ignore[misc]


# The laws, with the networks

sizes = st.sampled_from([(64, 64), (64, 128), (128, 64)])
lengths = st.integers(1, 69)
networks = settings(max_examples=examples(5, fast=2), suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def references(pipe: MemoPipeline, expected: dict[str, Tensor]) -> dict[tuple[int, int], Reference]:
    image = expected["in.reference_image"][0]
    return {
        (height, width): pipe.encode_reference(image[:, :height, :width], expected["in.face_embedding"])
        for height, width in ((64, 64), (64, 128), (128, 64))
    }


@given(size=sizes, frames=lengths, seed=seeds, past=st.booleans())
@networks
def test_value_of_sampling(pipe, references, track, emotions, size, frames, seed, past) -> None:
    reference = references[size]
    memory = MemoryState.empty()
    if past:
        latents = torch.randn(16, 4, *reference.latents.shape[2:], generator=torch.Generator().manual_seed(seed))
        memory = memory.push(latents, reference.face_embedding, pipe.nets.digest, reference.digest)
    noise = torch.randn(-(-frames // 16), 4, 16, *reference.latents.shape[2:])

    def inputs() -> list[Tensor]:
        return [
            noise,
            reference.pixels,
            reference.latents,
            reference.face_embedding,
            track.embeddings,
            emotions.labels,
            emotions.probabilities,
            *(part for entry in memory.entries for part in (entry.latents, entry.face_embedding)),
        ]

    def sample() -> tuple[Tensor, MemoryState]:
        clip, after = pipe.sample_clip(
            reference, track, emotions, memory, num_frames=frames, steps=1, seed=seed, noise=noise
        )
        return clip.latents, after

    before, digest = [tensor.clone() for tensor in inputs()], memory.digest
    latents, after = sample()
    again, after_again = sample()
    assert torch.equal(latents, again) and after.digest == after_again.digest
    assert memory.digest == digest and all(torch.equal(a, b) for a, b in zip(inputs(), before, strict=True))


@given(
    size=sizes,
    windows=st.integers(2, 4),
    split=st.integers(1, 3),
    tail=st.integers(1, 16),
    seed=seeds,
    steps=st.integers(1, 2),
    start=st.integers(0, 5),
    horizon=st.sampled_from([None, 1, 2]),
)
@networks
def test_split_of_sampling(
    pipe, references, track, emotions, size, windows, split, tail, seed, steps, start, horizon
) -> None:
    split = min(split, windows - 1)
    frames = 16 * (windows - 1) + tail
    options = dict(steps=steps, seed=seed)

    def sample(memory: MemoryState, first: int, count: int) -> tuple[Tensor, MemoryState]:
        clip, after = pipe.sample_clip(
            references[size], track, emotions, memory, start=first, num_frames=count, **options
        )
        return clip.latents, after

    at_once, after = sample(MemoryState.empty(horizon), start, frames)
    pipe._memory.clear()
    first, between = sample(MemoryState.empty(horizon), start, 16 * split)
    pipe._memory.clear()  # the second part must not need what the first left beside the model
    second, in_the_end = sample(between, start + 16 * split, frames - 16 * split)
    assert torch.equal(torch.cat([first, second], dim=1), at_once)
    assert in_the_end.digest == after.digest and in_the_end.windows == after.windows == windows


@given(size=sizes, frames=lengths)
@networks
def test_constant_size_in_sampling(pipe, references, track, size, frames) -> None:
    reference = references[size]
    memory = MemoryState.empty()
    for i in range(9):
        memory = memory.push(
            reference.latents.expand(16, -1, -1, -1) + i, reference.face_embedding, pipe.nets.digest, reference.digest
        )
    _, after = pipe.sample_clip(reference, track, memory=memory, num_frames=frames, steps=1, guidance_scale=1)
    assert after.nbytes <= 7 * (16 * 4 * reference.latents[0, 0].numel() + 512) * 4


RESUME = """
import sys
import torch
from safetensors.torch import load_file, save_file
from memo_core import EmotionTrack, MemoPipeline, MemoryState

folder, state, out = sys.argv[1:]
torch.set_num_threads(int(sys.stdin.read()))
given = load_file(f"{folder}/expected.safetensors")
pipe = MemoPipeline.from_pretrained(folder)
reference = pipe.encode_reference(given["in.reference_image"][0, :, 32:96, 32:96], given["in.face_embedding"])
track = pipe.encode_audio(given["in.waveform"], 16000)
clip, memory = pipe.sample_clip(reference, track, memory=MemoryState.load(state), start=32, num_frames=30, steps=1)
memory.save(state)
save_file({"latents": clip.latents.contiguous()}, out)
"""


def test_resume_of_sampling_in_another_process(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, memo_tiny: Path, tmp_path: Path
) -> None:
    whole, after = pipe.sample_clip(small, track, num_frames=62, steps=1)
    _, memory = pipe.sample_clip(small, track, num_frames=32, steps=1)
    state, out = tmp_path / "memory.safetensors", tmp_path / "rest.safetensors"
    memory.save(state)
    environment = os.environ | {"PYTHONPATH": str(FIXTURES.parent.parent)}
    subprocess.run(
        [sys.executable, "-c", RESUME, str(memo_tiny), str(state), str(out)],
        input=str(torch.get_num_threads()),
        text=True,
        env=environment,
        check=True,
        timeout=120,
    )
    assert torch.equal(load_file(out)["latents"], whole.latents[:, 32:])
    assert MemoryState.load(state).digest == after.digest


# Operations


@given(pasts, seeds, st.integers(0, 60), st.integers(0, 60))
def test_silence_fades_the_sums_and_adds_up(counts: list[int], seed: int, some: int, more: int) -> None:
    state = make(counts, seed)
    faded = state.decayed(some / 30)
    for mine, whole in zip(sums(faded), sums(state)):
        assert relative_l2(mine, DECAY**some * whole) < 1e-5  # (entries below 1e-9 are gone)
    twice, once = faded.decayed(more / 30), state.decayed((some + more) / 30)
    for a, b in zip(sums(twice), sums(once)):
        assert relative_l2(a, b) < 1e-5
    assert state.decayed(0).digest == state.digest and faded.windows == state.windows
    assert state.decayed(0.4, fps=50).digest == state.decayed(20 / 30).digest
    assert state.decayed(1e9).is_empty


def test_long_silence_leaves_nothing_and_then_the_portrait(
    pipe: MemoPipeline, small: Reference, track: AudioTrack
) -> None:
    _, memory = pipe.sample_clip(small, track, num_frames=16, steps=1)
    forgotten = memory.decayed(10)
    assert forgotten.is_empty and not memory.decayed(5).is_empty
    new, _ = pipe.sample_clip(small, track, num_frames=16, steps=1)
    after_silence, _ = pipe.sample_clip(small, track, memory=forgotten, num_frames=16, steps=1)
    assert torch.equal(new.latents, after_silence.latents)


@given(pasts, pasts, seeds, st.floats(0, 1))
def test_blending_states_blends_their_sums(first: list[int], second: list[int], seed: int, weight: float) -> None:
    a, b = make(first, seed), make(second, seed + 1000)
    blended = MemoryState.blend(a, b, weight)
    for mine, x, y in zip(sums(blended), sums(a), sums(b)):
        wanted = (1 - weight) * x + weight * y
        # Of two full pasts the lightest windows go: two of six cannot hold more than 0.9^48 of either.
        assert (mine - wanted).norm() <= 1e-6 * wanted.norm() + 10 * DECAY**48
    assert blended.digest == MemoryState.blend(b, a, 1 - weight).digest or weight not in (0, 0.25, 0.5, 0.75, 1)
    assert sum(len(entry.latents) for entry in blended.entries) <= 112


def test_blending_by_hand() -> None:
    shared = push(MemoryState.empty(), 16, 0)
    left, right = push(shared, 16, 1), push(shared, 8, 2)
    blended = MemoryState.blend(left, right, 0.25)
    weights = {entry.digest: entry.weight for entry in blended.entries}
    assert weights == pytest.approx(
        {
            shared.entries[0].digest: 0.75 * DECAY**16 + 0.25 * DECAY**8,
            left.entries[1].digest: 0.75,
            right.entries[1].digest: 0.25,
        }
    )
    assert same_entries(MemoryState.blend(left, right, 0), left) and same_entries(
        MemoryState.blend(left, right, 1), right
    )
    assert same_entries(MemoryState.blend(left, left, 0.5), left)
    half = MemoryState.blend(left, MemoryState.empty(), 0.5)
    assert [entry.weight for entry in half.entries] == pytest.approx([0.5 * DECAY**16, 0.5])


def test_a_blend_can_be_sampled_from(pipe: MemoPipeline, small: Reference, track: AudioTrack) -> None:
    def sample(memory: MemoryState) -> Tensor:
        return pipe.sample_clip(small, track, memory=memory, start=16, num_frames=16, steps=1)[0].latents

    (_, a), (_, b) = (pipe.sample_clip(small, track, num_frames=16, steps=1, seed=seed) for seed in (1, 2))
    blended = sample(MemoryState.blend(a, b, 0.5))
    assert torch.isfinite(blended).all()
    assert not torch.equal(blended, sample(a)) and not torch.equal(blended, sample(b))
    assert torch.equal(sample(MemoryState.blend(a, b, 0)), sample(a))


def test_one_state_goes_on_twice_independently() -> None:
    state = make([16, 16])
    before = [(entry.digest, entry.weight) for entry in state.entries]
    one, other = push(state, 16, 7), push(state, 16, 8)
    assert len(one.entries) == len(other.entries) == 3 and one.digest != other.digest
    assert [(entry.digest, entry.weight) for entry in state.entries] == before


def test_inspection_tells_what_is_remembered() -> None:
    state = make([16, 16, 4], horizon=2).decayed(0.1)
    text = state.inspect()
    for part in (
        state.digest,
        MODEL,
        PORTRAIT,
        "3 seen, 2 remembered",
        "last 2 windows",
        f"bytes        {state.nbytes}",
        "16 frames at 2 x 2 latents",
        "4 frames",
        "weight 0.729",
        f"weight {DECAY**7:.3g}",
    ):
        assert part in text
    assert "all past" in MemoryState.empty().inspect() and "last 1 window\n" in MemoryState.empty(1).inspect()
    assert state.nbytes == 20 * 4 * 2 * 2 * 4 + 2 * 512 * 4


def test_digests_tell_states_apart() -> None:
    state = make([16, 16])
    others = [
        make([16]),
        make([16, 15]),
        make([16, 16], seed=1),
        state.decayed(0.1),
        make([16, 16], horizon=3),
        MemoryState(state.entries, None, 2, MODEL, MODEL),
        MemoryState(state.entries, None, 2, PORTRAIT, PORTRAIT),
    ]
    assert len({other.digest for other in [state, *others]}) == 1 + len(others)
    assert make([16, 16]).digest == state.digest


@pytest.mark.parametrize(
    "make_it, named",
    [
        (lambda: MemoryState.empty(0), "horizon .* received 0"),
        (lambda: MemoryState.empty(1.5), "horizon .* received 1.5"),
        (lambda: make([16]).decayed(-1), "seconds .* received -1"),
        (lambda: make([16]).decayed(float("nan")), "seconds .* received nan"),
        (lambda: MemoryState.blend(make([16]), make([16]), 1.5), "weight .* received 1.5"),
        (lambda: make([65]), r"\[F, 4, h, w\] with F from 1 to 64, received \[65, 4, 2, 2\]"),
        (lambda: make([16]).push(window(16, 0)[0], FACE, MODEL, PORTRAIT), r"received \[4, 2, 2\]"),
        (lambda: make([16]).push(window(16, 0) / 0, FACE, MODEL, PORTRAIT), "NaN or infinite"),
        (
            lambda: make([16]).push(window(16, 0), FACE[0], MODEL, PORTRAIT),
            r"face embedding is \[1, 512\], received \[512\]",
        ),
        (lambda: push(make([16]), 16, 0, side=4), r"one latent size, received \[\[4, 2, 2\], \[4, 4, 4\]\]"),
        (lambda: make([16]).push(window(16, 0), FACE, "other", PORTRAIT), f"checkpoint {MODEL}, .* other"),
        (lambda: make([16]).push(window(16, 0), FACE, MODEL, "other"), f"reference {PORTRAIT} .* other"),
        (
            lambda: MemoryState.blend(make([16]), MemoryState(make([16]).entries, None, 1, "other", PORTRAIT), 0.5),
            f"checkpoint other, .* {MODEL}",
        ),
    ],
)
def test_bad_values_are_named(make_it, named: str) -> None:
    with pytest.raises(MemoryStateError, match=named):
        make_it()


# The file


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "state.safetensors"
    make([16, 16, 5]).save(path)
    return path


def rewrite(path: Path, **changes: str) -> None:
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, metadata=header | changes)


def test_an_empty_state_is_saved_too(tmp_path: Path) -> None:
    MemoryState.empty(3).save(tmp_path / "state")
    loaded = MemoryState.load(tmp_path / "state")
    assert loaded.is_empty and loaded.horizon == 3


@given(data=st.data())
@settings(max_examples=examples(40, fast=20), suppress_health_check=list(HealthCheck))
def test_damaged_files_are_refused(tmp_path: Path, data) -> None:
    path = tmp_path / "state"
    make([16, 16, 5]).save(path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans(), "truncate"):
        damaged = content[: data.draw(st.integers(0, len(content) - 1), "length")]
    else:
        place = data.draw(st.integers(header, len(content) - 1), "place")
        damaged = (
            content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255), "flipped")]) + content[place + 1 :]
        )
    path.write_bytes(damaged)
    with pytest.raises(MemoryStateError, match="damaged|not a readable memory state"):
        MemoryState.load(path)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"version": "3"}, "version 3, this program reads versions 1, 2"),
        ({"format": "other"}, "not a memory state"),
        ({"state": "{"}, "damaged"),
        ({"state": "[]"}, "damaged"),
        ({"state": "{}"}, "damaged"),
        ({"state": "[" * 100_000 + "]" * 100_000}, "damaged"),
        ({"state": '{"horizon": ' + "9" * 5000 + "}"}, "damaged"),
    ],
)
def test_other_files_are_refused(saved: Path, changes: dict[str, str], named: str) -> None:
    rewrite(saved, **changes)
    with pytest.raises(MemoryStateError, match=named):
        MemoryState.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "x"},
        {"reference": "x"},
        {"horizon": 2},
        {"horizon": 0},
        {"weights": [1, 1]},
        {"weights": [0.1, 0.2, 1]},
        {"weights": [float("nan")] * 3},
        {"weights": [1] * 4},
        {"windows": float("inf")},
        {"windows": "many"},
        {"windows": -1},
        {"windows": True},
        {"windows": 1e400},
        {"horizon": "x"},
        {"horizon": 10**400},
        {"model": ["m"]},
        {"reference": None},
        {"digest": 3},
        {"weights": ["1", "1", "1"]},
        {"weights": [True] * 3},
        {"weights": [1e300] * 3},
        {"weights": [1e-12] * 3},
        {"weights": [1] * 100_000},
        {"weights": "1"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_header_that_does_not_fit_is_refused(saved: Path, change: dict) -> None:
    with safe_open(saved, "pt") as file:
        state = json.loads(file.metadata()["state"])
    rewrite(saved, state=json.dumps(state | change))
    with pytest.raises(MemoryStateError, match="damaged"):
        MemoryState.load(saved)


def test_what_is_no_state_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MemoryStateError, match="no memory state at"):
        MemoryState.load(tmp_path / "absent")
    with pytest.raises(MemoryStateError, match="no memory state at"):
        MemoryState.load(tmp_path)
    save_file({"latents.0": window(16, 0)}, tmp_path / "plain")
    with pytest.raises(MemoryStateError, match="not a memory state"):
        MemoryState.load(tmp_path / "plain")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(300 * MIB)
    with pytest.raises(MemoryStateError, match="at most"):
        MemoryState.load(tmp_path / "huge")


def test_a_state_that_cannot_be_written_leaves_the_old_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MemoryStateError, match="No space left"):
        make([16]).save(saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]
    with pytest.raises(MemoryStateError, match="cannot write"):
        make([16]).save(saved.parent / "absent" / "state")


SAVER = """
import sys, time
import torch
from pathlib import Path
from memo_core import MemoryState

def half_written(path, content):
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    print("half", flush=True)
    time.sleep(60)

first = MemoryState.empty().push(torch.zeros(16, 4, 8, 8), torch.ones(1, 512), "m", "r")
first.save(sys.argv[1])
print(first.digest, flush=True)
Path.write_bytes = half_written
first.push(torch.zeros(16, 4, 8, 8), torch.ones(1, 512), "m", "r").save(sys.argv[1])
"""


def test_a_process_killed_while_it_saves_leaves_the_state_before(tmp_path: Path) -> None:
    path = tmp_path / "state"
    environment = os.environ | {"PYTHONPATH": str(FIXTURES.parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        digest, half = process.stdout.readline().strip(), process.stdout.readline().strip()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert half == "half" and MemoryState.load(path).digest == digest
    assert len(list(tmp_path.iterdir())) == 2
    make([16]).save(path)  # and what the killed process left beside it goes
    assert list(tmp_path.iterdir()) == [path]
    assert MemoryState.load(path).digest == make([16]).digest


def test_a_state_is_a_file_like_any_other(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        make([16]).save(tmp_path / "a.memory")
    finally:
        os.umask(before)
    assert (tmp_path / "a.memory").stat().st_mode & 0o777 == 0o644


def test_a_state_of_another_size_is_refused_before_sampling(
    pipe: MemoPipeline, small: Reference, track: AudioTrack, tmp_path: Path
) -> None:
    """Its digests are what somebody wrote into a file."""
    state = MemoryState.empty().push(torch.zeros(16, 4, 4, 4), FACE, pipe.nets.digest, small.digest)
    state.save(tmp_path / "forged")
    with pytest.raises(MemoryStateError, match=r"latents \[4, 4, 4\].*reference has latents \[4, 8, 8\]"):
        pipe.job(small, track, memory=MemoryState.load(tmp_path / "forged"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.bool, torch.float16])
@pytest.mark.parametrize("name", ["latents.1", "face_embedding.0"])
def test_a_state_of_other_numbers_is_refused(saved: Path, dtype: torch.dtype, name: str) -> None:
    with safe_open(saved, "pt") as file:
        header = file.metadata()
    tensors = load_file(saved)
    save_file(tensors | {name: tensors[name].to(dtype)}, saved, metadata=header)
    with pytest.raises(MemoryStateError, match=f"{name} holds"):
        MemoryState.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"extra": torch.zeros(3)},
        {"latents.3": torch.zeros(16, 4, 8, 8)},
        {"latents.0": torch.zeros(16, 4, 0, 8)},
        {"latents.0": torch.zeros(16, 8, 8, 8)},
        {"latents.0": torch.zeros(16, 4, 4, 4)},
        {"face_embedding.2": torch.zeros(512)},
        {"latents.0": torch.full((16, 4, 8, 8), float("nan"))},
    ],
    ids=lambda change: f"{next(iter(change))} {list(next(iter(change.values())).shape)}",
)
def test_odd_tensors_are_refused(saved: Path, change: dict[str, torch.Tensor]) -> None:
    with safe_open(saved, "pt") as file:
        header = file.metadata()
    save_file(load_file(saved) | change, saved, metadata=header)
    with pytest.raises(MemoryStateError, match="damaged"):
        MemoryState.load(saved)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "a\0b", "x" * 5000, tmp_path / "\udcff", "", 3, None, [tmp_path]):
        with pytest.raises(MemoryStateError):
            MemoryState.load(path)
    for path in (tmp_path / "no" / "x", "a\0b", "x" * 5000, "", 3, None, [tmp_path], tmp_path):
        with pytest.raises(MemoryStateError):
            make([16]).save(path)

    def refused(*_: object) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.setattr("memo_core.tensorfile.open_regular", refused)  # root may read everything
    with pytest.raises(MemoryStateError, match="Permission denied"):
        MemoryState.load(tmp_path / "pipe")


def test_numpy_numbers_are_numbers_and_truth_values_are_not() -> None:
    state = make([16, 16])
    assert state.with_horizon(np.int64(1)).horizon == 1 and state.decayed(np.float32(0.5)).digest
    assert MemoryState.blend(state, state, np.float64(0.5)).entries
    for call in (
        lambda: MemoryState.empty(True),
        lambda: MemoryState.empty(1.5),
        lambda: state.with_horizon("2"),
        lambda: state.with_horizon([]),
        lambda: state.decayed(True),
        lambda: state.decayed(None),
        lambda: state.decayed(10**400),
        lambda: MemoryState.blend(state, state, True),
        lambda: MemoryState.blend(state, state, "0.5"),
        lambda: MemoryState.blend(state, None, 0.5),
        lambda: state.push(None, FACE, "m", "r"),
        lambda: state.push(window(16, 0), FACE, "m", "r", windows="1"),
        lambda: MemoryState(3),
        lambda: MemoryState((3,)),
        lambda: MemoryState(model=["m"]),
        lambda: MemoryEntry("x", FACE),
        lambda: MemoryEntry(window(16, 0), FACE, "1"),
        lambda: MemoryEntry(window(16, 0), FACE, 1e300),
    ):
        with pytest.raises(MemoryStateError):
            call()
    assert state.decayed(1e300, 1e300).is_empty


@pytest.mark.parametrize("seconds, fps", [(-1, 30), (float("nan"), 30), (1, float("nan")), (1, -30), ("2", 30)])
def test_time_is_a_finite_number_that_does_not_run_backwards(seconds: float, fps: float) -> None:
    with pytest.raises(MemoryStateError, match="must be a finite number, at least 0, received"):
        make([16]).decayed(seconds, fps)


@pytest.mark.parametrize("latents, face", [((16, 7, 8, 8), (1, 512)), ((16, 4, 8, 8), (1, 8))])
def test_entries_of_another_kind_are_refused(latents: tuple[int, ...], face: tuple[int, ...]) -> None:
    with pytest.raises(MemoryStateError, match="received"):
        MemoryEntry(torch.zeros(latents), torch.zeros(face))


def test_a_header_without_a_digest_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.memory"
    make([16]).save(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    state = json.loads(header["state"])
    del state["digest"]
    save_file(load_file(path), path, metadata=header | {"state": json.dumps(state)})
    with pytest.raises(MemoryStateError, match="is damaged"):
        MemoryState.load(path)
