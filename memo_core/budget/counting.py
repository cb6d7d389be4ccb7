"""What sampling needs, counted instead of guessed.

The networks themselves, at full size, run once on tensors without data (the meta device), and every storage that an
operation makes is counted for as long as something holds it. So the count follows the code. It cannot see what only
the device knows: `RESERVE` is an assumption.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .. import kernels
from ..checkpoint.networks import SamplingNetworks
from ..memory.sums import FP8
from ..nets.conditions import Conditions, Prepared
from ..nets.layers import attention_fused, attention_is_fused
from ..nets.past import Memory, in_turn
from ..nets.temporal import TemporalAttention
from ..running import precision
from ..sampling.settings import Settings
from ..sampling.vae import few_frames

if TYPE_CHECKING:
    from ..encoders.autoencoder import AutoencoderKL

GIB = 2**30
# Work space of cuBLAS and cuDNN beside the copies counted by `LiveBytes`, and fragmentation; with Triton also 256 MiB
# that its autotuning clears between measurements.
RESERVE = (512 if kernels.EXPECTED else 256) * 2**20


def _like_rows(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _like_input(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_aten = torch.ops.aten
# What these make, said in short: torch takes a millisecond to find it out.
SHORTCUTS = {
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
        short = SHORTCUTS.get(func) if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        result = func(*args, **(kwargs or {})) if short is None else short(*args)
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage(), args)
        if short is not None and not args[0].is_contiguous():
            self.peak = max(self.peak, self.now + args[0].nbytes)
        rearranged = func in _CONVOLUTIONS and result.itemsize == 2
        if rearranged and not result.is_contiguous(memory_format=torch.channels_last):
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
    """Attention as a fused kernel does it, of which nothing but the output is ever made.

    Or as torch does without, in float32.
    """

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


def without_data(nets: SamplingNetworks) -> SamplingNetworks:
    """The networks that sample, on the meta device: every module as it is, the weights but their shapes."""
    names = ("reference_net", "diffusion_net", "image_proj", "audio_proj", "vae")
    empty: dict[str, Any] = {name: _without_data(getattr(nets, name)) for name in names}
    return replace(nets, device=torch.device("meta"), **empty)


Module = TypeVar("Module", bound=nn.Module)


def _without_data(module: Module) -> Module:
    memo: dict[int, Tensor]
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
        frames: a window's in float32.
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
    frames: int

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


def needs(
    nets: SamplingNetworks, height: int, width: int, settings: Settings, host_moves_weights: bool = False
) -> Needs:
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


def _count(nets: SamplingNetworks, height: int, width: int, batch: int, how: tuple[bool, bool]) -> _Counted:
    net, size, window = nets.diffusion_net, (height // 8, width // 8), nets.window
    dtype = net.conv_in.weight.dtype

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def face_tokens(rows: int) -> Tensor:
        return numbers(rows, nets.image_proj.tokens, net.config.cross_attention_dim)

    def read(rows: int) -> list[Tensor]:
        return nets.reference_net(numbers(rows, 4, *size), face_tokens(rows))

    def step(prepared: Prepared, memory: list[Memory]) -> Tensor:
        return net(latents, shifts, prepared, in_turn(memory))

    def of_window(layer: TemporalAttention, key: Tensor, value: Tensor) -> tuple[torch.Size, torch.Size]:
        memory = layer.carries.of_window(key, value)
        for _ in range(-(-(layer.carries.frames or 1) // window) - 1):  # until it holds all that it may
            memory = layer.carries.update(memory, 1.0, key, value)
        return memory[0].shape, memory[1].shape

    reading, past = peak_of(lambda: read(batch * window), *how)
    summing, shapes = peak_of(lambda: [of_window(*layer) for layer in net.past(past, *size, window)], *how)
    sums = [(numbers(*kv), numbers(*z)) for kv, z in shapes]
    portrait = [feature[:batch].clone() for feature in past]
    conditions = Conditions(
        reference=[feature[None] for feature in portrait],
        face_tokens=face_tokens(batch),
        audio_tokens=numbers(batch, window, nets.audio_proj.tokens, net.config.audio_attention_dim),
        emotion=torch.empty(batch, dtype=torch.long, device="meta"),
        frames=window,
    )
    prepared = net.prepare(conditions)
    latents = numbers(1, 4, window, *size).to(precision.carried(dtype))
    shifts = net.time_shifts(torch.zeros(1, device="meta"), dtype)
    whole = peak_of(lambda: step(prepared, sums), *how)[0]
    by_row = whole
    if batch == 2:
        by_row = peak_of(lambda: step(prepared.guidance_row(1), [(kv[:1], z[:1]) for kv, z in sums]), *how)[0]
    need = Needs(
        reference_net=module_bytes(nets.reference_net),
        diffusion_net=module_bytes(net),
        others=sum(module_bytes(module) for module in (nets.image_proj, nets.audio_proj, nets.vae)),
        layers=tuple(kv.nbytes + z.nbytes for kv, z in sums),
        layer=max((kv.nbytes + z.nbytes for kv, z in sums), default=0),
        features=tensor_bytes(past),
        reading=reading,
        summing=summing,
        conditions=tensor_bytes(portrait, prepared),
        step=whole,
        step_by_row=by_row,
        **_count_vae(nets.vae, *size, window, how[0]),
    )
    kept = tuple((kv.numel(), z.nbytes) for kv, z in sums)
    return _Counted(needs=need, sums=kept)


def _count_vae(vae: AutoencoderKL, h: int, w: int, window: int, fused: bool) -> dict[str, int]:
    def numbers(half: Any, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=half.conv_in.weight.dtype, device="meta")

    code, frame = numbers(vae.decoder, 1, 4, h, w), numbers(vae.encoder, 1, 3, 8 * h, 8 * w)
    decoding = peak_of(lambda: vae.decode(code, return_dict=False)[0], fused)[0]
    encoding = peak_of(lambda: vae.encode(frame, return_dict=False)[0].mean, fused)[0]
    return {"decoding": decoding, "encoding": encoding, "frames": 4 * window * 3 * 64 * h * w}


@torch.inference_mode()
def vae_bytes(nets: SamplingNetworks, height: int, width: int) -> int:
    """Bytes that the VAE takes besides its weights while it codes as many frames at once as it does by itself."""
    known = _counted_vae.setdefault(nets.vae, {})
    if (height, width) not in known:
        fused = attention_is_fused(nets.device)
        need = _count_vae(_without_data(nets.vae), height // 8, width // 8, nets.window, fused)
        frame = max(need["decoding"], need["encoding"])
        known[height, width] = few_frames(height, width) * frame + 3 * need["frames"] + RESERVE
    return known[height, width]
