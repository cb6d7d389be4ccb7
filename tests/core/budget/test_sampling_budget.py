"""What sampling needs is counted, what a budget leads to fits it, and where things lie changes no picture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import examples, relative_l2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import networks
from memo_core import MemoPipeline, MemoryState, devices
from memo_core.budget import counting, report
from memo_core.budget.counting import GIB, RESERVE, LiveBytes, Needs, needs, without_data
from memo_core.budget.plan import VAE_FRAMES, choose_plan, least_plan, plan_of, smaller_plan
from memo_core.budget.report import DRIVER
from memo_core.checkpoint.load import load
from memo_core.checkpoint.networks import Networks
from memo_core.cli import main
from memo_core.devices import free_bytes
from memo_core.encoders.emotion2vec import Emotion2Vec
from memo_core.encoders.emotion_head import EmotionHead
from memo_core.encoders.speech import SpeechEncoder
from memo_core.errors import SamplingError
from memo_core.memory.cache import MemoryCache
from memo_core.memory.state import MemoryEntry
from memo_core.memory.stream import WindowMemory, _Buffers
from memo_core.memory.sums import FP8, LayerMemory
from memo_core.nets import layers
from memo_core.nets.past import LinearSums
from memo_core.running import host_memory, offload
from memo_core.sampling import clip as sampling
from memo_core.sampling.plan import Plan
from memo_core.sampling.settings import Settings, Speed
from memo_core.sampling.store import WindowStore
from memo_core.sampling.vae import few_frames
from memo_core.sampling.window import sample_window

EXACT, BALANCED = Settings(), Settings(speed="balanced")


@pytest.fixture
def full(released_nets: Networks) -> Networks:
    return released_nets


def seen_by_allocator(run: Callable[[], Any]) -> int:
    """Most bytes that the CPU's allocator had served at once for what `run` makes, by its own running total: events
    put in the order of their times were seen to free after they made what had come next."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
    del result
    totals = list(_totals(seen.profiler.kineto_results.experimental_event_tree()))
    return max(total for total, _ in totals) - min(total - size for total, size in totals if size > 0)


def _totals(events: list[Any]) -> Iterator[tuple[int, int]]:
    """(bytes served after it, bytes that it took) of every allocation in a tree of events."""
    for event in events:
        fields = event.extra_fields
        if hasattr(fields, "total_allocated"):
            yield fields.total_allocated, fields.alloc_size
        yield from _totals(event.children)


# --- Counting ---------------------------------------------------------------------------------------------------------


def test_live_bytes_are_those_that_something_holds() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first[10:]
        second = first + 1
        assert live.now == 8000
        del first
        assert live.now == 8000  # the view holds it
        del view, second
        third = torch.zeros(500)
    assert live.now == 2000 and live.peak == 8000
    del third


def test_what_was_there_before_is_not_counted() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as live:
        before[5:].view(-1).mul_(2)
    assert live.peak == 0


@pytest.fixture(scope="module")
def cpu_needs(pipe: MemoPipeline) -> Needs:
    """What 128 x 128 pixels take with the CPU's pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(layers.FEED_FORWARD_TOKENS, False, layers.FEED_FORWARD_TOKENS[True])
        patch.setattr(counting, "_counted", {})  # others may have counted before, with a GPU's pieces
        return needs(pipe.nets, 128, 128, EXACT)


@pytest.mark.parametrize("part", ["reading", "summing", "decoding", "encoding"])
def test_parts_take_what_the_allocator_says(pipe: MemoPipeline, cpu_needs: Needs, part: str) -> None:
    """Counted without data, and as the CPU's allocator served the same work with data."""
    nets, size = pipe.nets, (16, 16)
    latents, code, frame = torch.zeros(32, 4, *size), torch.zeros(1, 4, *size), torch.zeros(1, 3, 128, 128)
    with torch.inference_mode():
        tokens = torch.zeros(32, nets.image_proj.tokens, nets.diffusion_net.config.cross_attention_dim)
        past = nets.reference_net(latents, tokens)

    def sum_up() -> None:
        for layer, key, value in nets.diffusion_net.past(past, *size, 16):
            layer.carries.of_window(key, value)

    # Of maps in another order the CPU's convolutions make copies, which a GPU's do not in float32.
    ordered = {"memory_format": torch.channels_last}
    vae, code, frame = copy.deepcopy(nets.vae).to(**ordered), code.to(**ordered), frame.to(**ordered)
    run = {
        "reading": lambda: nets.reference_net(latents, tokens),
        "summing": sum_up,
        "decoding": lambda: vae.decode(code, return_dict=False)[0],
        "encoding": lambda: vae.encode(frame, return_dict=False)[0].mean,
    }[part]
    assert getattr(cpu_needs, part) == pytest.approx(seen_by_allocator(run), rel=0.1)


def test_the_released_size_takes_what_is_known_of_it(full: Any) -> None:
    need = needs(full, 512, 512, EXACT)
    assert need.diffusion_net == 2 * sum(p.numel() for p in full.diffusion_net.parameters()) > 2 * 1.67e9
    assert len(need.layers) == 42 and 6.9e9 < sum(need.layers) < 7.1e9
    halved = needs(full, 512, 512, BALANCED)
    assert 0.5 < sum(halved.layers) / sum(need.layers) < 0.52  # z stays as it is
    alone = needs(full, 512, 512, Settings(guidance_scale=1.0))
    assert 2 * sum(alone.layers) == sum(need.layers) and alone.step == need.step_by_row < need.step
    assert need.features == pytest.approx(0.77e9, rel=0.01)


def test_counting_leaves_the_networks_alone(pipe: MemoPipeline) -> None:
    bare = without_data(pipe.nets)
    assert all(p.is_meta for p in bare.diffusion_net.parameters())
    assert not any(p.is_meta for p in pipe.nets.diffusion_net.parameters())
    assert bare.vae.config.scaling_factor == pipe.nets.vae.config.scaling_factor


# --- Plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [EXACT, BALANCED, Settings(guidance_scale=1.0)], ids=["exact", "balanced", "alone"]
)
def test_plans_fit_and_give_up_more_as_budgets_shrink(full: Any, settings: Settings) -> None:
    plans = [choose_plan(full, 512, 512, settings, room * GIB // 2) for room in range(60, 12, -1)]
    for room, plan in zip(range(60, 12, -1), plans):
        assert plan.peak <= room * GIB // 2
        assert plan.peak == plan.weights + plan.sums + plan.features + plan.working
    first, last = plans[0], plans[-1]
    assert first.reference_net_stays and first.vae_frames == VAE_FRAMES
    assert not first.sums_on_host and not first.on_host
    assert not last.reference_net_stays and last.sums_on_host
    hosted = [plan.sums_on_host for plan in plans if not plan.row_by_row]
    assert hosted == sorted(hosted)
    for room, plan in zip(range(60, 12, -1), plans):  # what costs more time is not given up before what costs less
        frame_by_frame = plan_of(needs(full, 512, 512, settings), vae_frames=1)
        assert plan.reference_net_stays or frame_by_frame.peak > room * GIB // 2
        assert not plan.sums_on_host or not plan.reference_net_stays
        assert not plan.row_by_row or plan.sums_on_host


def test_cards_of_artists_are_enough(full: Any) -> None:
    exact = choose_plan(full, 512, 512, EXACT, 12 * GIB - DRIVER)
    balanced = choose_plan(full, 512, 512, BALANCED, 8 * GIB - DRIVER)
    assert not exact.row_by_row and not balanced.row_by_row


def test_what_does_not_fit_is_said_with_what_does(full: Any) -> None:
    with pytest.raises(SamplingError, match=r"512x512 pixels need at least \d\.\d GB and 5\.5 GB are available.*size"):
        choose_plan(full, 512, 512, EXACT, 11 * GIB // 2)
    with pytest.raises(SamplingError, match="What fits: nothing"):
        choose_plan(full, 512, 512, EXACT, GIB)
    host = choose_plan(full, 512, 512, EXACT, 4 * GIB, host_moves_weights=True)
    assert host.weights == 0 and host.reference_net_stays


def test_after_running_out_of_memory_there_is_a_smaller_plan_until_there_is_none(full: Any) -> None:
    plan, peaks = choose_plan(full, 512, 512, EXACT), []
    while plan is not None:
        peaks.append(plan.peak)
        plan = smaller_plan(full, 512, 512, EXACT, plan)
    assert peaks == sorted(set(peaks), reverse=True) and len(peaks) > 3
    assert peaks[-1] == least_plan(full, 512, 512, EXACT).peak


def test_info_prints_the_budget_without_any_weights(
    full: Networks, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "released", lambda: full)  # of which much is counted already
    assert main(["info", "released", "--budget", "12"]) == 0
    out = capsys.readouterr().out
    need = needs(full, 512, 512, EXACT)
    rows = [line.split() for line in out.splitlines() if line.startswith("exact ")]
    assert rows[0][1:3] == [f"{part / GIB:.1f}" for part in (plan_of(need).weights, sum(need.layers))]
    assert "12 GB card (11.5 GB)" in out and "layers on the host" in out and "8 GB" not in out
    for wrong in (
        ["info", "released"],
        ["info", "released", "--size", "512"],
        ["info", "toon", "--budget", "--size", "100"],
    ):
        assert main(wrong) == 1
    assert main(["info", "released", "--budget", "-3"]) == 2


def test_on_the_cpu_free_memory_does_not_decide_how_the_vae_works(full: Any) -> None:
    on_cpu = replace(full, device=torch.device("cpu"))
    least = least_plan(on_cpu, 512, 512, EXACT).peak
    plans = [choose_plan(on_cpu, 512, 512, EXACT, room) for room in (least, 2 * least, 8 * least, None)]
    assert {plan.vae_frames for plan in plans} == {few_frames(512, 512)}
    assert plans[1].peak == plans[2].peak  # what is free is not taken because it is free
    assert choose_plan(on_cpu, 128, 128, EXACT, 8 * least).vae_frames == few_frames(128, 128) > 1


@pytest.mark.parametrize("window, at_once", [(12, 8), (16, 16), (32, 32)])
def test_a_window_is_the_checkpoints(pipe: MemoPipeline, window: int, at_once: int) -> None:
    """So many frames are made, and no more go through the VAE at once."""
    nets = without_data(pipe.nets)
    nets.diffusion_net.config = replace(nets.diffusion_net.config, window=window)
    assert needs(nets, 64, 64, EXACT).frames == window * 3 * 64 * 64 * 4
    assert choose_plan(nets, 64, 64, EXACT).vae_frames == at_once


def test_free_memory_of_the_current_card_is_asked_for_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def mem_get_info(device: int | None) -> tuple[int, int]:
        assert device in (None, 1)  # torch 2.4 takes no device without a number
        return 1000, 2000

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    assert [free_bytes(torch.device(name)) for name in ("cuda", "cuda:1")] == [1000, 1000]


# --- Networks that wait in host memory --------------------------------------------------------------------------------


class OnCard(nn.Parameter):
    """Says that it lies on a device of its own, and notes when it is moved; the first move of a `stubborn` one is
    interrupted."""

    stubborn = False
    moves = 0

    @property
    def device(self) -> torch.device:
        return torch.device("mps")

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if self.stubborn:
            self.stubborn = False
            raise KeyboardInterrupt
        self.moves += 1
        Tensor.data.__set__(self, value)


def test_a_network_whose_leaving_was_interrupted_comes_back_whole() -> None:
    net = nn.ParameterList([OnCard(torch.ones(2)), OnCard(torch.ones(2))])
    places = [p.data_ptr() for p in net]
    net[1].stubborn = True
    with pytest.raises(KeyboardInterrupt):
        offload.to_host(net)
    assert [p.moves for p in net] == [1, 0]
    offload.to_device(net, torch.device("cpu"))
    offload.to_device(net, torch.device("cpu"))  # it is back
    assert [p.tolist() for p in net] == [[1, 1], [1, 1]] and net[1].data_ptr() == places[1]


def test_weights_are_copied_to_the_host_once_and_again_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever way they were changed: in place, through `data`, or replaced."""
    copied, copy = [], Tensor.copy_
    net = nn.ParameterList([OnCard(torch.ones(3, 2).to(torch.bfloat16)), OnCard(torch.ones(2))])
    monkeypatch.setattr(Tensor, "copy_", lambda to, what, **how: copied.append(what.shape) or copy(to, what, **how))

    def there_and_back() -> list[torch.Size]:
        copied.clear()
        offload.to_host(net)
        offload.to_device(net, torch.device("cpu"))  # `to` gives the host's own copy: on a device it is another
        for parameter in net:
            Tensor.data.__set__(parameter, Tensor.data.__get__(parameter).clone())
        return list(copied)

    assert there_and_back() == [(3, 2), (2,)]
    assert there_and_back() == []
    with torch.no_grad():
        net[1].add_(1)
    assert there_and_back() == [(2,)] and net[1].tolist() == [2, 2]
    Tensor.data.__get__(net[0]).mul_(3)
    assert there_and_back() == [(3, 2)] and net[0].flatten().tolist() == [3] * 6
    offload.free_host_copy(net)
    assert there_and_back() == [(3, 2), (2,)]


def test_weights_that_were_replaced_while_they_waited_come_too() -> None:
    """As by options or adapters between loading and the first window."""
    net = nn.ParameterDict({"a": OnCard(torch.ones(2)), "b": OnCard(torch.ones(3))})
    offload.start_on_host(net)
    net["a"], net["c"] = OnCard(torch.full((4,), 2.0)), OnCard(torch.full((5,), 3.0))
    offload.to_device(net, torch.device("cpu"))
    assert {name: p.moves for name, p in net.items()} == {"a": 1, "b": 1, "c": 1} and net not in offload._away
    offload.to_host(net)  # has another size now
    assert {name: p.sum().item() for name, p in net.items()} == {"a": 8, "b": 3, "c": 15}


def test_the_order_of_weights_in_memory_survives() -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    net = nn.ParameterList([OnCard(weight.clone())])
    offload.to_host(net)
    assert torch.equal(net[0], weight) and net[0].stride() == weight.stride()
    offload.to_device(net, torch.device("cpu"))
    assert torch.equal(net[0], weight) and net[0].stride() == weight.stride()


class Runtime:
    """CUDA's runtime, which locks so many bytes of main memory and no more, and keeps the error of a call that failed
    until it is asked for."""

    failed = False

    def __init__(self, most: int) -> None:
        self.most, self.locked = most, {}

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        assert pointer % 4096 == 0  # pages of its own
        if sum(self.locked.values()) + size > self.most:
            self.failed = True
            return 2
        self.locked[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.locked[pointer]
        return 0


@pytest.fixture
def lockable(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Runtime]:
    def allow(most: int) -> Runtime:
        runtime = Runtime(most)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
        monkeypatch.setattr(host_memory, "_refused", False)
        monkeypatch.setattr(host_memory, "_clear_error", lambda _: setattr(runtime, "failed", False))
        return runtime

    return allow


CARD = torch.device("cuda", 0)


def test_host_memory_is_locked_to_the_byte_and_given_back(lockable: Callable[[int], Runtime]) -> None:
    runtime = lockable(GIB)
    memory, views = host_memory.HostMemory.for_([torch.ones(1000), torch.ones(3, 5, dtype=torch.bfloat16)], CARD)
    views[0].fill_(2), views[1].fill_(3)
    assert list(runtime.locked.values()) == [memory.bytes.nbytes] == [4096 + 256]
    assert views[0].sum() == 2000 and views[1].shape == (3, 5) and views[1].sum() == 45
    del memory, views
    assert not runtime.locked


def test_memory_that_cannot_be_locked_serves_unlocked_and_it_is_said_once(
    lockable: Callable[[int], Runtime], caplog: pytest.LogCaptureFixture
) -> None:
    runtime = lockable(1000)
    for _ in range(2):
        memory = host_memory.HostMemory(2000, CARD)
        assert memory.bytes.fill_(7).sum() == 14000 and not runtime.locked and not runtime.failed
    assert len(caplog.messages) == 1 and "cannot be locked" in caplog.messages[0]


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_weights_moved_in_inference_mode_can_still_be_trained(made: bool, moved: bool) -> None:
    with torch.inference_mode(made):
        net = nn.ParameterList([OnCard(torch.ones(2), requires_grad=not made)])
    with torch.inference_mode(moved):
        offload.to_host(net)
        offload.to_device(net, torch.device("cpu"))
    assert net[0].moves == 2 and net[0].is_inference() == made
    if not made:
        with torch.no_grad():
            net[0].add_(1)
        (net[0] ** 2).sum().backward()
        assert net[0].grad.tolist() == [4, 4]


# --- Sampling by a plan -----------------------------------------------------------------------------------------------


Sample = Callable[..., tuple[Tensor, Plan]]
FRAMES = 16 * 3 * 64 * 64 * 4  # bytes of a window's pictures


@pytest.fixture(scope="module")
def sample() -> Sample:
    """Latents of two windows, so that sums are made and carried on, with these choices of a plan."""
    nets = networks.tiny()

    def run(speed: str | Speed = "exact", **choices: Any) -> tuple[Tensor, Plan]:
        job = networks.clip(MemoPipeline(nets), 64, 2, steps=1, speed=speed)
        plan = plan_of(needs(nets, 64, 64, job.settings), **choices)
        windows = MemoPipeline(nets).sample_windows(job, plan=plan)
        return torch.cat([window.latents for window in windows], dim=1), plan

    return run


def test_a_plan_changes_no_pictures(sample: Sample) -> None:
    whole, _ = sample()
    assert torch.equal(sample(sums_on_device=1)[0], whole)
    assert relative_l2(sample(row_by_row=True, vae_frames=3, sums_on_device=0)[0], whole) < 1e-5  # rounding


def test_fp8_sums_change_pictures_little(sample: Sample) -> None:
    whole, halved = sample()[0], sample(Speed(fp8_sums=True))[0]
    assert 0 < relative_l2(halved, whole) < 1e-2
    assert torch.equal(sample(Speed(fp8_sums=True), sums_on_device=1)[0], halved)


@pytest.mark.slow
def test_a_rebuild_looks_at_several_windows_in_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = networks.tiny()
    job = networks.clip(MemoPipeline(nets), 64, 4, steps=1)
    whole = list(MemoPipeline(nets).sample_windows(job))
    plan = plan_of(needs(nets, 64, 64, job.settings), reference_net_stays=False)
    turns, leave = [], offload.to_host
    monkeypatch.setattr(offload, "to_host", lambda net: turns.append(net) or leave(net))
    for several, wanted in ((1, 1 + 4), (2, 1 + 2), (12, 1 + 1)):  # and the portrait's turn
        rest = replace(job, start=48, num_frames=16, memory=whole[2].memory)  # by another process, as it were
        turns.clear()
        (last,) = MemoPipeline(nets).sample_windows(rest, plan=replace(plan, windows_a_turn=several))
        assert torch.equal(last.latents, whole[3].latents)
        assert turns.count(nets.diffusion_net) == wanted
    assert plan.windows_a_turn == 12 and plan.on_host > 12 * needs(nets, 64, 64, job.settings).features


def test_out_of_memory_is_tried_once_more_by_a_smaller_plan(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the window on that failed, with progress and bits as if nothing had happened; a second time it is said."""
    nets = networks.tiny()
    job = networks.clip(MemoPipeline(nets), 64, 3, steps=2)
    first = plan_of(needs(nets, 64, 64, job.settings))
    wanted = [window.latents for window in MemoPipeline(nets).sample_windows(job, plan=first)]
    second = replace(first, sums_on_device=0, sums_on_host=len(needs(nets, 64, 64, job.settings).layers))
    failures, steps, sampled = [2], [], sample_window

    def scarce(*args: Any, **how: Any) -> Tensor | None:
        if len(steps) == 2 and failures:
            failures.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sampled(*args, **how)

    monkeypatch.setattr(sampling, "sample_window", scarce)
    monkeypatch.setattr(MemoPipeline, "plan", lambda *_: first)
    monkeypatch.setattr("memo_core.budget.placement.smaller_plan", lambda *_: second)
    pipe = MemoPipeline(nets)
    made = list(pipe.sample_windows(job, on_progress=lambda done, total: steps.append((done, total))))
    assert all(torch.equal(window.latents, latents) for window, latents in zip(made, wanted, strict=True))
    assert steps == [(done, 6) for done in range(1, 7)] and not failures
    assert "once more from frame 16 on" in caplog.text
    failures += [2, 2]
    steps.clear()
    with pytest.raises(torch.OutOfMemoryError):
        list(pipe.sample_windows(job, on_progress=lambda done, total: steps.append((done, total))))


def test_the_large_nets_come_to_a_device_when_they_are_to_sample(
    memo_tiny: Path, monkeypatch: pytest.MonkeyPatch, track: Any, reference: Any
) -> None:
    """Loaded for a device they wait in host memory: what listens, and the VAE, have its room before."""
    came, enter, moved, to = [], offload.to_device, set(), Tensor.to

    def as_if(tensor: Tensor, *where: Any, **how: Any) -> Tensor:
        """A move to a device that is not there."""
        there = [str(place) for place in (*where, *how.values())]
        out = to(tensor, *("cpu" if str(place) == "mps" else place for place in where), **how)
        if "mps" not in there:
            return out
        out = out.clone()
        moved.add(out.data_ptr())
        return out

    monkeypatch.setattr(offload, "start_on_host", lambda net: came.append(f"{type(net).__name__} waits"))
    monkeypatch.setattr(Tensor, "to", as_if)
    for listener in (SpeechEncoder, Emotion2Vec, EmotionHead):
        monkeypatch.setattr(listener, "from_pretrained", lambda *_, **how: nn.Identity())
    nets = load(memo_tiny, "mps", large_nets_wait=True)
    assert came == ["ReferenceNet waits", "DiffusionNet waits"]
    here = {name for name in NETS if next(getattr(nets, name).parameters()).data_ptr() in moved}
    assert here == {"image_proj", "audio_proj", "vae"}
    monkeypatch.undo()
    pipe = MemoPipeline.from_pretrained(memo_tiny)
    for net in (pipe.nets.reference_net, pipe.nets.diffusion_net):
        offload.start_on_host(net)
    monkeypatch.setattr(offload, "to_device", lambda net, device: came.append(net) or enter(net, device))
    (window,) = pipe.sample_windows(pipe.job(reference, track, num_frames=16, steps=1))
    assert pipe.nets.reference_net in came and pipe.nets.diffusion_net in came and not offload._away


NETS = ("reference_net", "diffusion_net", "image_proj", "audio_proj", "vae")


def test_two_jobs_of_one_pipeline_may_take_turns() -> None:
    nets = networks.tiny()
    pipe = MemoPipeline(nets)
    exact, coarse = (networks.clip(pipe, 64, 3, steps=1, speed=speed) for speed in ("exact", Speed(fp8_sums=True)))
    alone = [window.latents for window in MemoPipeline(nets).sample_windows(exact)]
    in_turns = zip(pipe.sample_windows(exact), pipe.sample_windows(coarse))
    for (mine, _), wanted in zip(in_turns, alone, strict=True):
        assert torch.equal(mine.latents, wanted)


def test_a_stored_job_needs_no_plan_and_so_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets, store = networks.tiny(), WindowStore(tmp_path)
    pipe = MemoPipeline(nets)
    job = networks.clip(pipe, 64, 2, steps=1)
    made = [window.latents for window in pipe.sample_windows(job, store=store)]

    def too_large(*_: object) -> None:
        raise SamplingError("needs more than there is")

    monkeypatch.setattr(pipe, "plan", too_large)
    again = list(pipe.sample_windows(job, store=store))
    assert all(torch.equal(window.latents, wanted) for window, wanted in zip(again, made, strict=True))
    with pytest.raises(SamplingError, match="more than there is"):
        next(pipe.sample_windows(networks.clip(pipe, 64, 2, steps=1, seed=1), store=store))


def test_a_device_without_8_bit_floats_is_told_to_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = replace(devices.of("cpu"), fp8=False)
    monkeypatch.setattr(devices, "of", lambda _: lacking)
    pipe = MemoPipeline(networks.tiny())
    with pytest.raises(SamplingError, match="speed 'draft' .* choose speed 'exact'"):
        next(pipe.sample_windows(networks.clip(pipe, 64, 1, speed="draft")))
    next(pipe.sample_windows(networks.clip(pipe, 64, 1, steps=1)))


@pytest.mark.parametrize("choices", [{}, {"vae_frames": 16}], ids=["step", "vae"])
def test_a_real_run_takes_what_its_plan_says(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any]
) -> None:
    monkeypatch.setitem(layers.FEED_FORWARD_TOKENS, True, layers.FEED_FORWARD_TOKENS[False])  # a GPU's pieces
    plan = sample(**choices)[1]
    with LiveBytes() as live:
        sample(**choices)
    # On the CPU the pictures of the window before are counted, too: they are handed over on the host.
    counted = plan.peak - plan.weights - RESERVE + FRAMES
    assert 0.97 * live.peak <= counted <= 1.25 * live.peak


# --- Where memory sums lie --------------------------------------------------------------------------------------------


def entry(seed: int) -> MemoryEntry:
    generator = torch.Generator().manual_seed(seed)
    return MemoryEntry(torch.randn(16, 4, 4, 4, generator=generator), torch.zeros(1, 512))


class _Sums(LinearSums):
    """Of three layers, [1, 8, 2, 8, 8] and [1, 8, 2, 8]: what the "keys" and "values" of an entry are already."""

    def of_window(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return key.clone(), value.clone()

    def update(self, memory: tuple[Tensor, Tensor], factor: float, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return memory[0].mul_(factor).add_(key), memory[1].mul_(factor).add_(value)


LAYER = SimpleNamespace(carries=_Sums())


def past_of(of: MemoryEntry) -> Iterator[tuple[SimpleNamespace, Tensor, Tensor]]:
    flat = of.latents.flatten()
    kv, z = flat.view(1, 8, 2, 8, 8), flat[:128].abs()
    for layer in range(3):
        yield LAYER, kv * (1 + layer), z.view(1, 8, 2, 8) * (1 + layer)


def state(windows: int) -> MemoryState:
    made = MemoryState.empty()
    for seed in range(windows):
        made = made.push(entry(seed).latents, entry(seed).face_embedding, "model", "reference")
    return made


def gathered(
    cache: MemoryCache, state: MemoryState, dtype: torch.dtype | None = None, on_device: int | None = None
) -> list[Tensor]:
    memory = cache.memory_of(state, "", past_of, dtype=dtype, on_device=on_device)
    return [part.clone() for pair in memory for part in pair]


@pytest.mark.parametrize("dtype", [None, FP8], ids=["exact", "fp8"])
def test_where_sums_lie_and_whether_they_were_cached_changes_no_bits(dtype: torch.dtype | None) -> None:
    caches = {on_device: MemoryCache() for on_device in (None, 0, 1)}
    for windows in (1, 2, 4):
        rebuilt = gathered(MemoryCache(), state(windows), dtype)
        for on_device, cache in caches.items():
            for kept, made in zip(gathered(cache, state(windows), dtype, on_device), rebuilt):
                assert torch.equal(kept, made)
    faded = [gathered(cache, state(4).decayed(0.1), dtype, on_device) for on_device, cache in caches.items()]
    assert all(torch.equal(a, b) for others in faded[1:] for a, b in zip(others, faded[0]))
    smaller = gathered(caches[None], state(5), dtype, 1)  # a smaller plan, in the middle of a clip
    for kept, made in zip(smaller, gathered(MemoryCache(), state(5), dtype)):
        assert torch.equal(kept, made)


def test_only_what_must_be_fetched_is_fetched() -> None:
    """What lies on the device as the networks read it is handed out as it is."""
    cache = MemoryCache()
    memory = cache.memory_of(state(2), "", past_of, on_device=2)
    own = [
        memory[layer][0].data_ptr() == memory[layer][0].data_ptr() == cache._layers[layer].kv.data_ptr()
        for layer in (0, 1)
    ]
    assert own == [True, True] and memory.on_host and len(memory) == 3
    restored = MemoryCache().memory_of(state(2), "", past_of, dtype=FP8)
    assert restored[0][0].data_ptr() != restored[0][0].data_ptr()
    kv, z = MemoryCache().memory_of(state(2), "", past_of, on_device=0).rows(slice(0, 0))[0]
    assert len(kv) == len(z) == 0


class Clock:
    """What streams, events and copies do to each other: every piece of work knows all work that is certain to be done
    before it."""

    def __init__(self) -> None:
        self.done: dict[str, set[int]] = {"compute": set(), "copy": set()}
        self.count, self.on = 0, "compute"

    def work(self) -> int:
        """A piece of work on the current stream; its number."""
        self.count += 1
        self.done[self.on].add(self.count)
        return self.count


class FakeStream:
    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def wait_stream(self, other: FakeStream) -> None:
        self.clock.done[self.name] |= self.clock.done[other.name]

    def wait_event(self, event: FakeEvent) -> None:
        self.clock.done[self.name] |= event.done


class FakeEvent:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def record(self, stream: FakeStream) -> None:
        self.done = set(self.clock.done[stream.name])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """torch's streams, played."""
    clock = Clock()

    @contextmanager
    def on_stream(stream: FakeStream) -> Iterator[None]:
        clock.on, before = stream.name, clock.on
        yield
        clock.on = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: FakeStream(clock, "copy"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: FakeStream(clock, "compute"))
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(clock))
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None, raising=False)
    return clock


class Watched(LayerMemory):
    """Memory in host memory that tells where it is brought to, before it is."""

    def __init__(self, kv: Tensor, z: Tensor, on_fetch: Callable[[Tensor | None], object]):
        self.on_fetch = on_fetch
        super().__init__(kv, z, on_host=True)

    def fetch(self, rows: slice = slice(None), into: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.on_fetch(into)
        return super().fetch(rows, into)


PASSES = st.lists(st.tuples(st.sampled_from(["whole", "first", "second"]), st.integers(1, 5)), max_size=12)


@settings(max_examples=examples(60, fast=20), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 5), passes=PASSES)
def test_what_comes_from_the_host_ahead_of_its_use_is_the_layer_in_use(
    clock: Clock, count: int, passes: list[tuple[str, int]]
) -> None:
    """Over passes of the whole batch and of its halves in any order, of which some end before their last layer: what is
    read is the layer, its copy is done before, and nothing is copied over what is still to be read."""
    copies: dict[int, list[int]] = {}  # by the buffer's address
    reads: dict[int, list[int]] = {}

    def copied(into: Tensor | None) -> None:
        assert clock.on == "copy" and into is not None
        assert set(reads.get(into.data_ptr(), [])) <= clock.done["copy"], "copied over what is still to be read"
        copies.setdefault(into.data_ptr(), []).append(clock.work())

    rows = torch.arange(2.0).view(2, 1, 1, 1)
    layers = [
        Watched((rows[..., None] + 2 * i).expand(2, 4, 1, 2, 2), (rows + 2 * i).expand(2, 4, 1, 2), copied)
        for i in range(count)
    ]
    with torch.inference_mode():  # as `MemoryCache.memory_of` makes them, to be read in or outside
        buffers = _Buffers(max(layer.buffer_bytes(slice(None)) for layer in layers), torch.device("cpu"))
    whole = WindowMemory(layers, buffers=buffers)
    views = {"whole": (whole, [0, 1]), "first": (whole.guidance_row(0), [0]), "second": (whole.guidance_row(1), [1])}
    for name, length in passes:
        view, wanted = views[name]
        for i in range(min(length, len(view))):
            kv, z = view[i]
            assert kv[:, 0, 0, 0, 0].tolist() == z[:, 0, 0, 0].tolist() == [row + 2 * i for row in wanted]
            buffer = next(
                b.data_ptr() for b in buffers.buffers if b.data_ptr() <= kv.data_ptr() < b.data_ptr() + b.nbytes
            )
            assert set(copies[buffer]) <= clock.done["compute"], "read before its copy is done"
            reads.setdefault(buffer, []).append(clock.work())


def test_two_layers_and_the_next_passs_first_one_come_ahead(clock: Clock) -> None:
    began: list[int] = []
    rows = torch.zeros(2, 4, 1, 2)
    layers = [Watched(torch.zeros(2, 4, 1, 2, 2), rows, lambda _, i=i: began.append(i)) for i in range(4)]
    memory = WindowMemory(layers, buffers=_Buffers(layers[0].buffer_bytes(slice(None)), torch.device("cpu")))
    seen = []
    for _ in range(2):
        for _ in memory:
            seen.append(list(began))
    assert seen[:4] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 0], [0, 1, 2, 3, 0, 1]]
    assert seen[4] == [0, 1, 2, 3, 0, 1, 2]


def test_fp8_halves_the_sums_and_costs_a_few_percent() -> None:
    exact, halved = MemoryCache(), MemoryCache()
    for mine, wanted in zip(gathered(halved, state(6), FP8), gathered(exact, state(6))):
        assert relative_l2(mine, wanted) < 0.04  # 3 bits of mantissa: 2.6 % of each number on average
    assert halved.nbytes < 0.4 * exact.nbytes  # of float32; z stays

    def huge(of: MemoryEntry) -> list[tuple[SimpleNamespace, Tensor, Tensor]]:
        return [(layer, kv * 1e30, z) for layer, kv, z in past_of(of)]

    scaled = MemoryCache().memory_of(state(1), "", huge, dtype=FP8)
    assert relative_l2(scaled[0][0], huge(entry(0))[0][1]) < 0.04  # a scale per head: the range of fp8 is no matter
    empty = (LAYER, torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 2))
    nothing = MemoryCache().memory_of(state(1), "", lambda _: [empty], dtype=FP8)
    assert not nothing[0][0].any()
