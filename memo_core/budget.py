"""What sampling needs, counted instead of guessed: bytes on the device, and how to get by with fewer.

The networks themselves, at full size, run once on tensors without data (the meta device), and every storage that an
operation makes is counted for as long as something holds it. So the count follows the code. It cannot see what only
the device knows: `RESERVE` is an assumption.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import kernels, precision
from .checkpoint import Networks
from .clips import WINDOW
from .devices import free_bytes
from .errors import SamplingError
from .job import Settings
from .memory import AHEAD, FP8, MOST_WINDOWS
from .nets.diffusion_net import WindowConditions
from .nets.layers import attention_fused, attention_is_fused
from .sampling import few_frames
from .speed import PRESETS

GIB = 2**30
# Work space of cuBLAS and cuDNN beside the copies counted by `LiveBytes`, and fragmentation; with Triton also 256 MiB
# that its autotuning clears between measurements.
RESERVE = (256 if kernels._triton is None else 512) * 2**20
DRIVER = GIB // 2  # what the driver and torch's context take of a card
SEEN_AT_ONCE = 2 * GIB  # of host memory, for what the Reference Net sees of several windows in one turn
VAE_FRAMES = 2  # at once at 512 x 512 at most: one fills a GPU already, more take memory, more than a step


def vae_frames(height: int, width: int) -> list[int]:
    """Frames that may go through the VAE at once on a device with memory of its own, most first: `plan` takes the most
    that fit, so there the last bits of pictures, and of the memory made of them, may follow free memory. No map of the
    decoder has 2^31 numbers, from where on layers of torch refuse or take rarely used paths: up to 2,896 x 2,896
    pixels; beyond, one frame's has. On the CPU it is always `few_frames`.
    """
    most = max(1, min(WINDOW, VAE_FRAMES * 512 * 512 // (height * width)))
    return [frames for frames in (16, 8, 4, 2, 1) if frames <= most]


def _like_rows(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _like_input(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_aten = torch.ops.aten
# What these make, said in short: torch takes a millisecond to find it out.
_SHORT = {
    _aten.linear.default: _like_rows,
    _aten.layer_norm.default: _like_input,
    _aten.group_norm.default: _like_input,
    _aten.gelu.default: _like_input,
}
_CONVOLUTIONS = {_aten.conv2d.default, _aten.convolution.default}


class LiveBytes(TorchDispatchMode):
    """Inside it, counts the bytes of all storages that operations make and something still holds.

    Counted as on a CUDA device: norms and linear layers copy what is not contiguous, and cuDNN rearranges
    half-precision maps that are not channels-last, before a convolution and after it.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        short = _SHORT.get(func) if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        result = func(*args, **(kwargs or {})) if short is None else short(*args)
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage(), args)
        if short is not None and not args[0].is_contiguous():
            self.peak = max(self.peak, self.now + args[0].nbytes)
        if func in _CONVOLUTIONS and result.itemsize == 2:
            if not result.is_contiguous(memory_format=torch.channels_last):
                self.peak = max(self.peak, self.now + args[0].nbytes + result.nbytes)
        return result

    def _see(self, storage: torch.UntypedStorage, args: tuple[Any, ...]) -> None:
        key, size = storage._cdata, storage.nbytes()
        # A view of what was there before is not made here.
        if key in self._known or any(isinstance(a, Tensor) and a.untyped_storage()._cdata == key for a in args):
            return
        self._known.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Attention(TorchFunctionMode):
    """Attention as a fused kernel does it, of which nothing but the output is ever made; or as torch does without, in
    float32."""

    def __init__(self, fused: bool):
        super().__init__()
        self.fused = fused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._C._nn.scaled_dot_product_attention:  # torch's own name: hosts put others under its public
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        if self.fused:
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        scores = (query.float() @ key.float().transpose(-2, -1)).softmax(dim=-1)
        return (scores @ value.float()).to(query.dtype)


def peak_of(run: Callable[[], Any], fused: bool = True, kernels_run: bool = False) -> tuple[int, Any]:
    """Most bytes that `run` makes and holds at once, what it returns among them; and what it returns.

    Args:
        fused: attention is one kernel, otherwise it is computed in pieces (`layers.attend`).
        kernels_run: this project's kernels do, otherwise torch's operators.
    """
    shapes = kernels.as_shapes() if kernels_run else nullcontext()
    with torch.inference_mode(), LiveBytes() as live, attention_fused(fused), _Attention(fused), shapes:
        result = run()
    return live.peak, result


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def tensor_bytes(*values: Any) -> int:
    """Bytes of the tensors in these values (tensors, or lists or tuples of such values), each storage counted once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(values)
    return sum(storages.values())


def without_data(nets: Networks) -> Networks:
    """The networks that sample, on the meta device: every module as it is, the weights but their shapes."""
    names = ("reference_net", "diffusion_net", "image_proj", "audio_proj", "vae")
    return replace(nets, device=torch.device("meta"), **{name: _without_data(getattr(nets, name)) for name in names})


def _without_data(module: nn.Module) -> nn.Module:
    memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes that sampling at one size takes, part by part.

    Attributes:
        reference_net, diffusion_net, others: weights; the others are the two projections and the VAE.
        layers: the memory's sums per memory layer as they are kept, in execution order.
        layer: the largest of them as the networks read it.
        restored: the same where it is kept in another form, else 0.
        features: what the Reference Net sees in a remembered window's frames.
        reading: the Reference Net reading them, features among it.
        summing: making sums of them, layer by layer, besides features and kept sums.
        conditions: what the steps of a window share.
        step: one step of the Diffusion Net besides; step_by_row: the same, a batch row at a time.
        decoding, encoding: the VAE with one frame.
        pictures: the window's frames in float32.
    """

    reference_net: int
    diffusion_net: int
    others: int
    layers: tuple[int, ...]
    layer: int
    restored: int = 0
    features: int
    reading: int
    summing: int
    conditions: int
    step: int
    step_by_row: int
    decoding: int
    encoding: int
    pictures: int

    def times(self, factor: float) -> Needs:
        """The same at `factor` times as many pixels."""
        weights = ("reference_net", "diffusion_net", "others", "layers")
        grown = {name: int(factor * getattr(self, name)) for name in self.__slots__ if name not in weights}
        return replace(self, layers=tuple(int(factor * layer) for layer in self.layers), **grown)

    def unguided(self) -> Needs:
        """At most what is needed with guidance 1, from what is needed with guidance."""
        halved = {name: getattr(self, name) // 2 for name in ("layer", "restored", "features", "summing", "conditions")}
        return replace(self, layers=tuple(layer // 2 for layer in self.layers), step=self.step_by_row, **halved)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counted:
    """What does not depend on the speed preset."""

    needs: Needs
    sums: tuple[tuple[int, int], ...]  # per layer, numbers in kv and bytes of z


_counted_vae: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, int], int]] = weakref.WeakKeyDictionary()
_counted: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, int, bool, bool, bool], _Counted]]
_counted = weakref.WeakKeyDictionary()


def needs(nets: Networks, height: int, width: int, settings: Settings, host_moves_weights: bool = False) -> Needs:
    """Counts what sampling at height x width pixels takes; about a second at the released size, then it is known.

    Args:
        nets: with or without data.
        settings: of which guidance and speed matter.
        host_moves_weights: then norms may lie in host memory, and be computed by torch's operators.
    """
    known = _counted.setdefault(nets.diffusion_net, {})
    how = attention_is_fused(nets.device), kernels.runs_on(nets.device) and not host_moves_weights
    key = (height, width, settings.guided, *how)
    if key not in known:
        with torch.inference_mode():
            known[key] = _count(without_data(nets), height, width, 2 if settings.guided else 1, how)
    counted, need, speed = known[key], known[key].needs, settings.speed
    # What a window's recorded steps compute in stays theirs, whatever else is done.
    graphs = need.step if nets.options is not None and nets.options.cuda_graphs else 0
    return replace(
        need,
        conditions=need.conditions + graphs,
        layers=tuple(n * FP8.itemsize + z for n, z in counted.sums) if speed.fp8_sums else need.layers,
        restored=need.layer if speed.fp8_sums else 0,
    )


def _count(nets: Networks, height: int, width: int, batch: int, how: tuple[bool, bool]) -> _Counted:
    net, size, dtype = nets.diffusion_net, (height // 8, width // 8), nets.diffusion_net.conv_in.weight.dtype

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def face_tokens(rows: int) -> Tensor:
        return numbers(rows, nets.image_proj.tokens, net.config.cross_attention_dim)

    def read(rows: int) -> list[Tensor]:
        return nets.reference_net(numbers(rows, 4, *size), face_tokens(rows))

    def step(given: WindowConditions, memory: list[tuple[Tensor, Tensor]]) -> Tensor:
        return net(latents, shifts, given, memory)

    reading, past = peak_of(lambda: read(batch * WINDOW), *how)
    summing, shapes = peak_of(lambda: [(kv.shape, z.shape) for kv, z in net.memory_sums(past, *size, WINDOW)], *how)
    sums = [(numbers(*kv), numbers(*z)) for kv, z in shapes]
    portrait = [feature[:batch].clone() for feature in past]
    given = net.prepare(
        reference=[feature[None] for feature in portrait],
        face_tokens=face_tokens(batch),
        audio_tokens=numbers(batch, WINDOW, nets.audio_proj.tokens, net.config.audio_attention_dim),
        emotion=torch.empty(batch, dtype=torch.long, device="meta"),
        frames=WINDOW,
    )
    latents = numbers(1, 4, WINDOW, *size).to(precision.carried(dtype))
    shifts = net.time_shifts(torch.zeros(1, device="meta"), dtype)
    whole = peak_of(lambda: step(given, sums), *how)[0]
    by_row = whole
    if batch == 2:
        by_row = peak_of(lambda: step(given.half(1), [(kv[:1], z[:1]) for kv, z in sums]), *how)[0]
    need = Needs(
        reference_net=module_bytes(nets.reference_net),
        diffusion_net=module_bytes(net),
        others=sum(module_bytes(module) for module in (nets.image_proj, nets.audio_proj, nets.vae)),
        layers=tuple(kv.nbytes + z.nbytes for kv, z in sums),
        layer=max((kv.nbytes + z.nbytes for kv, z in sums), default=0),
        features=tensor_bytes(past),
        reading=reading,
        summing=summing,
        conditions=tensor_bytes(portrait, given),
        step=whole,
        step_by_row=by_row,
        **_count_vae(nets.vae, *size, how[0]),
    )
    kept = tuple((kv.numel(), z.nbytes) for kv, z in sums)
    return _Counted(needs=need, sums=kept)


def _count_vae(vae: nn.Module, h: int, w: int, fused: bool) -> dict[str, int]:
    def numbers(half: nn.Module, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=half.conv_in.weight.dtype, device="meta")

    code, frame = numbers(vae.decoder, 1, 4, h, w), numbers(vae.encoder, 1, 3, 8 * h, 8 * w)
    decoding = peak_of(lambda: vae.decode(code, return_dict=False)[0], fused)[0]
    encoding = peak_of(lambda: vae.encode(frame, return_dict=False)[0].mean, fused)[0]
    return {"decoding": decoding, "encoding": encoding, "pictures": 4 * WINDOW * 3 * 64 * h * w}


@torch.inference_mode()
def vae_bytes(nets: Networks, height: int, width: int) -> int:
    """Bytes that the VAE takes besides its weights while it codes as many frames at once as it does by itself."""
    known = _counted_vae.setdefault(nets.vae, {})
    if (height, width) not in known:
        need = _count_vae(_without_data(nets.vae), height // 8, width // 8, attention_is_fused(nets.device))
        frame = max(need["decoding"], need["encoding"])
        known[height, width] = few_frames(height, width) * frame + 3 * need["pictures"] + RESERVE
    return known[height, width]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How to sample within a budget. Only speed and, by `row_by_row` and `vae_frames`, the last bits depend on it.

    Attributes:
        row_by_row: the two batch rows of guidance go through the Diffusion Net one after the other.
        sums_on_device: how many memory layers, in execution order, keep their sums on the device.
        sums_on_host: how many, the rest, keep them in host memory.
        reference_net_stays: otherwise the Reference Net and the Diffusion Net take turns on the device, and the other
            one waits in host memory.
        vae_frames: how many frames go through the VAE at once.
        windows_a_turn: how many remembered windows the Reference Net looks at in one turn, if the sums are rebuilt.
        peak: bytes on the device when most is there, weights and `RESERVE` among them.
        weights, sums, features, working: what the peak is made of.
        on_host: bytes of host memory for what waits there.
        phase: what is being done at the peak.
    """

    row_by_row: bool
    sums_on_device: int
    sums_on_host: int
    reference_net_stays: bool
    vae_frames: int
    windows_a_turn: int
    peak: int
    weights: int
    sums: int
    features: int
    working: int
    on_host: int
    phase: str

    def describe(self) -> str:
        """What it does to save memory, in words."""
        words = []
        if not self.reference_net_stays:
            words.append("the two nets take turns")
        if self.sums_on_host:
            words.append(f"sums of {self.sums_on_host} of {self.sums_on_host + self.sums_on_device} layers on the host")
        if self.row_by_row:
            words.append("row by row")
        words = words or ["all on the device"]
        words.append(f"VAE {self.vae_frames} frame{'s' * (self.vae_frames > 1)} at once")
        return ", ".join(words)

    @classmethod
    def of(
        cls,
        need: Needs,
        *,
        row_by_row: bool = False,
        sums_on_device: int | None = None,
        reference_net_stays: bool = True,
        vae_frames: int = 1,
        streamed: int | None = None,
        reserve: int = RESERVE,
    ) -> Plan:
        """What these choices lead to.

        Args:
            sums_on_device: None for all.
            streamed: bytes of weights on the device where someone else takes care of them; None: all of them.
        """
        count = len(need.layers) if sums_on_device is None else sums_on_device
        kept, gone = need.layers[:count], need.layers[count:]
        # Buffers for what comes from the host, and the layer in use where it was kept in another form.
        brought = (AHEAD + 1) * max(gone, default=0) + need.restored
        both = need.reference_net + need.diffusion_net
        reads, denoises = (both, both) if reference_net_stays else (need.reference_net, need.diffusion_net)
        # Pictures: those decoded so far; for encoding as they are, as the VAE reads them, and in its number format.
        phases = {
            "reading past frames": (reads, 0, need.reading),
            "making sums": (denoises, need.features, need.summing + brought),
            "a step": (denoises, 0, (need.step_by_row if row_by_row else need.step) + brought),
            "decoding": (denoises, 0, vae_frames * need.decoding + need.pictures),
            "encoding": (denoises, 0, vae_frames * need.encoding + 3 * need.pictures),
        }
        if streamed is not None:
            phases = {name: (streamed, features, working) for name, (_, features, working) in phases.items()}
        # Each net's weights once they have waited, and what is seen of several windows in one turn.
        at_once = 1 if reference_net_stays else max(1, min(MOST_WINDOWS, SEEN_AT_ONCE // need.features))
        turns = 0 if reference_net_stays else both + (at_once * need.features if at_once > 1 else 0)
        phase = max(phases, key=lambda name: sum(phases[name]))
        weights, features, working = phases[phase]
        weights += need.others if streamed is None else 0
        features, working = features + need.conditions, working + reserve
        return cls(
            row_by_row=row_by_row,
            sums_on_device=count,
            sums_on_host=len(gone),
            reference_net_stays=reference_net_stays,
            vae_frames=vae_frames,
            windows_a_turn=at_once,
            peak=weights + sum(kept) + features + working,
            weights=weights,
            sums=sum(kept),
            features=features,
            working=working,
            on_host=sum(gone) + turns,
            phase=phase,
        )


def plan(
    nets: Networks,
    height: int,
    width: int,
    settings: Settings,
    budget_bytes: int | None = None,
    host_moves_weights: bool = False,
    streamed_weights: int = 0,
) -> Plan:
    """The fastest way to sample at height x width pixels within a budget.

    What costs least time goes first: fewer frames at once through the VAE; the Reference Net waiting in host memory;
    memory sums in host memory, from the last layer on; the two rows of guidance one after the other.

    Args:
        settings: of which guidance and speed matter.
        budget_bytes: what may be on the device, weights included; None: no limit. On the CPU, where there is no other
            place to wait, without the weights.
        host_moves_weights: a host program brings weights by itself, whole or layer by layer, so that they need not fit.
        streamed_weights: bytes of them that it has on the device even while it brings the others layer by layer.

    Raises:
        SamplingError: not even the last of these fits; it says what would.
    """
    need = needs(nets, height, width, settings, host_moves_weights)
    if budget_bytes is None:
        frames = few_frames(height, width) if nets.device.type == "cpu" else vae_frames(height, width)[0]
        return Plan.of(need, vae_frames=frames)
    streamed = streamed_weights if host_moves_weights else None
    for choices in _choices(need, nets.device, height, width, settings, streamed):
        made = Plan.of(need, **choices)
        if made.peak <= budget_bytes:
            return made

    def smallest(how: Settings) -> Plan:
        return least(nets, height, width, how, host_moves_weights, streamed_weights)

    raise SamplingError(_too_large(smallest, nets.device, height, width, settings, budget_bytes))


def smaller(
    nets: Networks,
    height: int,
    width: int,
    settings: Settings,
    than: Plan,
    host_moves_weights: bool = False,
    streamed_weights: int = 0,
) -> Plan | None:
    """The next plan that takes less, felt so: one some MB smaller would fail as well. None after the last."""
    try:
        return plan(nets, height, width, settings, int(than.peak * 0.9), host_moves_weights, streamed_weights)
    except SamplingError:
        last = least(nets, height, width, settings, host_moves_weights, streamed_weights)
        return last if last.peak < than.peak else None


def least(
    nets: Networks,
    height: int,
    width: int,
    settings: Settings,
    host_moves_weights: bool = False,
    streamed_weights: int = 0,
) -> Plan:
    """The plan that takes least."""
    need = needs(nets, height, width, settings, host_moves_weights)
    streamed = streamed_weights if host_moves_weights else None
    return Plan.of(need, **list(_choices(need, nets.device, height, width, settings, streamed))[-1])


def _choices(
    need: Needs, device: torch.device, height: int, width: int, settings: Settings, streamed: int | None
) -> Iterator[dict[str, Any]]:
    """What `Plan.of` may be given, fastest first; `streamed` where a host can bring weights layer by layer."""
    ways = (False, True) if settings.guided else (False,)
    if device.type == "cpu":
        fixed = {"streamed": 0, "reserve": 0, "vae_frames": few_frames(height, width)}
        yield from ({"row_by_row": row_by_row, **fixed} for row_by_row in ways)
        return
    layers = len(need.layers)
    weights = {"reference_net_stays": False} if streamed is None else {"streamed": streamed}
    # A host that streams weights does so at every step: the last resort.
    places = [{}] + [
        {"sums_on_device": count, "row_by_row": row_by_row, **keep}
        for keep in ((weights,) if streamed is None else ({}, weights))
        for row_by_row in ways
        for count in range(layers, -1, -1)
    ]
    yield from ({"vae_frames": frames, **place} for place in places for frames in vae_frames(height, width))


def _too_large(
    smallest: Callable[[Settings], Plan], device: torch.device, height: int, width: int, settings: Settings, budget: int
) -> str:
    """Says that a size does not fit, and what does.

    Args:
        smallest: the plan at this size that takes least, for these settings or others.
    """
    from .face import MAX_SIDE

    what: list[tuple[int, str]] = []
    for name, how in (("", settings), (" with guidance 1", replace(settings, guidance_scale=1.0))):
        fewest = smallest(how)
        fixed = fewest.weights + (0 if device.type == "cpu" else RESERVE)
        per_pixel = (fewest.peak - fixed) / (height * width)
        side = int((max(0, budget - fixed) / per_pixel) ** 0.5) // 64 * 64
        side = min(side, -(-max(height, width) // 64) * 64, MAX_SIDE)
        if side and side not in [other for other, _ in what]:
            what.append((side, name))
    sizes = " or ".join(f"size {side}{name}" for side, name in what)
    return (
        f"{width}x{height} pixels need at least {smallest(settings).peak / GIB:.1f} GB and {budget / GIB:.1f} GB are "
        f"available. What fits: {sizes or 'nothing'}"
    )


def check_room(
    nets: Networks,
    height: int,
    width: int,
    settings: Settings,
    room: int | None = None,
    host_moves_weights: bool = False,
    kept: int = 0,
) -> None:
    """Refuses a size that cannot fit before anything is computed at it.

    Counted where it is cheap, at the size the checkpoint was trained at, and scaled by the number of pixels, as every
    part but the weights grows, within a tenth: so much is let pass on devices, where `plan` counts exactly, later.

    Args:
        settings: of which guidance and speed matter.
        room: bytes that sampling may take, as `plan`'s budget; None: what is free where the networks run. On the CPU
            without the weights, which are there already.
        host_moves_weights: as for `plan`.
        kept: bytes of sums that will be let go of; added to what is free, not to a given room.

    Raises:
        SamplingError: it does not fit; names the largest size that does.
    """
    if room is None:
        room = free_bytes(nets.device) if nets.device.type == "cpu" else available_bytes(nets)
        if room is None:  # nobody says what is free
            return
        room += kept
    side = 8 * nets.sample_size

    def smallest(how: Settings) -> Plan:
        need = needs(nets, side, side, settings, host_moves_weights).times(height * width / side**2)
        if settings.guided and not how.guided:  # not counted, for a message alone
            need = need.unguided()
        choices = list(_choices(need, nets.device, height, width, how, 0 if host_moves_weights else None))
        # On the CPU nothing is planned, unless a host does: both rows at once.
        return Plan.of(need, **choices[0 if nets.device.type == "cpu" and not host_moves_weights else -1])

    # On the CPU nobody plans later: what does not fit there is killed by the system.
    certain = 1.0 if nets.device.type == "cpu" else 0.9
    if certain * smallest(settings).peak > room:
        raise SamplingError(_too_large(smallest, nets.device, height, width, settings, room))


# --- What there is ----------------------------------------------------------------------------------------------------


def available_bytes(nets: Networks) -> int | None:
    """What sampling may have on the networks' device: what is free, and what their weights there take already. None for
    the CPU, where there is no other place to wait."""
    free = free_bytes(nets.device)
    if nets.device.type == "cpu" or free is None:
        return None
    modules = (nets.reference_net, nets.diffusion_net, nets.image_proj, nets.audio_proj, nets.vae)
    tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return free + sum(t.nbytes for t in tensors if t.device.type == nets.device.type)


# --- memo info --budget -----------------------------------------------------------------------------------------------


def released(dtype: torch.dtype = torch.bfloat16) -> Networks:
    """The networks that sample, at the released size and without data: nothing needs to have been downloaded."""
    from diffusers import AutoencoderKL

    from .audio import NEIGHBOURS
    from .nets.config import NetConfig
    from .nets.diffusion_net import DiffusionNet
    from .nets.projections import AudioProjection, ImageProjection
    from .nets.reference_net import ReferenceNet

    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        modules = {
            "reference_net": ReferenceNet(NetConfig()),
            "diffusion_net": DiffusionNet(NetConfig()),
            "image_proj": ImageProjection(),
            "audio_proj": AudioProjection((2 * NEIGHBOURS + 1) * 12 * 768),
            "vae": vae,
        }
    listeners = dict.fromkeys(("speech_encoder", "emotion_encoder", "emotion_head"))
    return Networks(
        **{name: precision.set_weights(name, module, dtype).requires_grad_(False) for name, module in modules.items()},
        **listeners,
        folder=Path("released"),
        device=torch.device("meta"),
        base_digest="",
        sample_size=64,
    )


def table(nets: Networks, height: int, width: int, budgets: Sequence[tuple[str, int]]) -> str:
    """What each speed preset takes, and the plan for each budget, as text.

    Args:
        budgets: names, and bytes that sampling may take.
    """
    ways = {
        f"{name}{how}": Settings(speed=name, guidance_scale=scale)
        for name in PRESETS
        for how, scale in (("", 3.5), (", guidance 1", 1.0))
    }
    dtype = str(nets.diffusion_net.conv_in.weight.dtype).removeprefix("torch.")
    lines = [
        f"{width}x{height} pixels in {dtype}; GB are 2^30 bytes, at the moment when most is on the device.",
        "",
        f"{'all on the device':<22}{'weights':>9}{'sums':>7}{'features':>10}{'working':>9}{'peak':>7}",
    ]
    for name, settings in ways.items():
        whole = Plan.of(needs(nets, height, width, settings))
        parts = (whole.weights, whole.sums, whole.features, whole.working, whole.peak)
        lines.append(name.ljust(22) + "".join(f"{p / GIB:>{w}.1f}" for p, w in zip(parts, (9, 7, 10, 9, 7))))
    for title, room in budgets:
        lines += ["", f"{title + f' ({room / GIB:.1f} GB)':<31}{'sums':>7}{'host RAM':>10}{'':9}{'peak':>7}"]
        for name, settings in ways.items():
            try:
                chosen = plan(nets, height, width, settings, room)
            except SamplingError:
                fewest = least(nets, height, width, settings).peak
                lines.append(f"{name:<22}{'':26}{fewest / GIB:>16.1f}   does not fit: at least so much is needed")
                continue
            parts = f"{chosen.sums / GIB:>16.1f}{chosen.on_host / GIB:>10.1f}{chosen.peak / GIB:>16.1f}"
            lines.append(f"{name:<22}{parts}   {chosen.describe()}")
    lines += ["", f"Of a card {DRIVER / GIB:.1f} GB are the driver's."]
    return "\n".join(lines)
