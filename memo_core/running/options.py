"""Options that change how a loaded checkpoint computes: layout, fused layers, compilation, 8-bit weights.

All but `fp8_weights` give the same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from .. import devices, kernels
from ..checks import shown
from ..errors import CheckpointError
from ..nets.diffusion_net import DiffusionNet
from ..nets.layers import ResnetBlock
from ..nets.module import LayerModule
from .fp8 import keep_in_fp8

GRAPHS = 256  # that one piece of code may be compiled to: kinds of blocks times shapes, far more than any net has


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How the networks compute. Measured on one thread of a CPU in float32: toon at 128 x 128, and random weights of
    widths 64 to 256; on CUDA nothing is measured yet, and None means on where the Triton kernels run (but for
    compiled networks), by counted bytes, and off elsewhere.

    Attributes:
        rows_on_threads: guidance's two rows, and halves of the VAE's frames, run at the same time on a CPU, each with
            half of torch's threads. Threads that share one operation wait for each other whenever one of them does not
            run: beside one busy process two threads take half the time so, on a quiet machine as long. `memo generate`
            and the nodes do it; here it is off, because what belongs to a thread (profilers, dispatch modes) does not
            see the others.
        channels_last: convolutions of both UNets and the VAE work on [h, w, C]; with None not those of the VAE. On the
            CPU a step takes as long (0.99 to 1.04), encoding 0.75 to 0.85 and decoding 0.97 to 1.06 of the time.
        fuse_qkv: queries, keys and values of the same tokens in one matrix product. The layers' names in a state dict
            change: save, merge adapters and train before. On the CPU a step takes as long (0.97 to 1.02).
        compile: the blocks that a step repeats, and those of the VAE's decoder, run compiled (`torch.compile`). On the
            CPU a step of toon becomes 1.05 to 1.08 times as fast, decoding 0.95 times, after minutes of compilation at
            the first of each size (29 graphs for 50 blocks), which a later process finds in torch's cache.
        cuda_graphs: a window's steps after the first two replay a recorded one, without the host's work for every
            kernel. Needs a CUDA device; windows whose memory waits in host memory run as without.
        fp8_weights: keeps the large weights of both UNets in float8_e4m3fn, half of what bf16 takes, and multiplies
            them back at use. An approximation, and another `Networks.digest`: with every layer of toon so kept, a
            velocity is off by 3%, a window's latents by 2.4% (relative L2) and its frames by 1 of 255 on average.
    """

    channels_last: bool | None = None
    fuse_qkv: bool | None = None
    compile: bool = False
    cuda_graphs: bool = False
    fp8_weights: bool = False
    rows_on_threads: bool = False

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value, may_be_none = getattr(self, name), name in ("channels_last", "fuse_qkv")
            if not isinstance(value, bool) and not (value is None and may_be_none):
                kinds = "None, True or False" if may_be_none else "True or False"
                raise CheckpointError(f"{name} must be {kinds}, received {shown(value)}")


class LoadedNetworks(Protocol):
    """What `optimise` reads and changes of a loaded checkpoint; `checkpoint.networks.Networks` fits."""

    options: Options | None

    @property
    def reference_net(self) -> nn.Module:
        """The Reference Net."""

    @property
    def diffusion_net(self) -> DiffusionNet:
        """The Diffusion Net."""

    @property
    def vae(self) -> nn.Module:
        """The VAE, of which `decoder` is a part."""

    @property
    def device(self) -> torch.device:
        """Where they run."""


def optimise(nets: LoadedNetworks, options: Options) -> None:
    """Changes loaded networks, in place and once: `nets.options` then says how, without None.

    Networks with a host's own layer classes stay as they are where an option is None.

    Raises:
        CheckpointError: the networks have been changed before, or the device or a host's layers do not allow an option.
    """
    if not isinstance(options, Options):
        raise CheckpointError(f"options must be an Options, received {shown(options)}")
    if nets.options is not None:
        raise CheckpointError(f"these networks already have options: {nets.options}; load them again for others")
    asked, options = options, _decided(nets, options)
    big: tuple[nn.Module, ...] = (nets.diffusion_net, nets.reference_net)
    if options.fuse_qkv:
        for module in [module for net in big for module in net.modules()]:
            fuse: Any = getattr(module, "fuse", None)
            if fuse is not None:
                fuse()
    if options.fp8_weights:  # after fusing: the scales are per output channel, the same either way
        for net in big:
            keep_in_fp8(net)
    if options.channels_last:
        for net in (*big, nets.vae) if asked.channels_last else big:  # torch's group norm, as in the VAE, undoes it
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks this one
    if options.compile:
        compile_blocks(nets)
    nets.options = options


def _decided(nets: LoadedNetworks, options: Options) -> Options:
    asked = [name for name in Options.__slots__ if getattr(options, name)]
    if asked and type(nets.diffusion_net.conv_in) is not nn.Conv2d:
        raise CheckpointError(
            f"{', '.join(asked)}: not with a host's own layers, {type(nets.diffusion_net.conv_in).__module__}"
        )
    if options.cuda_graphs and nets.device.type != "cuda":
        raise CheckpointError(f"cuda_graphs needs a CUDA device, the networks are on {nets.device}: leave it off")
    if options.rows_on_threads and nets.device.type != "cpu":
        raise CheckpointError(f"rows_on_threads is for the CPU, the networks are on {nets.device}: leave it off")
    if options.fp8_weights and not devices.of(nets.device).fp8:
        raise CheckpointError(f"fp8_weights: {nets.device.type}, where the networks are, has no 8-bit floats")
    # Where the kernels run, maps lie channels-last between them anyway.
    gains = type(nets.diffusion_net.conv_in) is nn.Conv2d and kernels.runs_on(nets.device) and not options.compile
    return replace(options, **{name: gains for name in Options.__slots__ if getattr(options, name) is None})


# --- Compilation ------------------------------------------------------------------------------------------------------


def repeated_blocks(nets: LoadedNetworks) -> Iterator[nn.Module]:
    """What is compiled: the parts of a step that hold nearly all of its work, and those of the VAE's decoder.

    Of a layer module what it says of itself (`LayerModule.compiled`).
    """
    from ..encoders.autoencoder import PictureAttention, PictureBlock

    for module in nets.diffusion_net.modules():
        if isinstance(module, LayerModule):
            yield from module.compiled()
        elif isinstance(module, ResnetBlock):
            yield module
    for module in nets.vae.get_submodule("decoder").modules():
        if isinstance(module, (PictureBlock, PictureAttention)):
            yield module


def compile_blocks(nets: LoadedNetworks, backend: str | Callable = "inductor") -> None:
    """Has every repeated block compiled at its first call with a shape; a graph break is an error.

    Blocks of one class and one set of shapes share a graph (torch >= 2.5), so that the number of compilations does not
    grow with the depth of the net. Copies of the networks (`copy.deepcopy`) run uncompiled.
    """
    from torch._dynamo import config

    for name in ("recompile_limit", "cache_size_limit"):  # since torch 2.6, before
        if hasattr(config, name):
            setattr(config, name, max(getattr(config, name), GRAPHS))
    for block in repeated_blocks(nets):
        block.compile(backend=backend, fullgraph=True, dynamic=False)
