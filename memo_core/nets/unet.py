"""The UNet that both networks share: levels, widths, and the one walk down, through the middle and up again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import NetConfig
from .layers import (
    Downsample,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    as_laid_out,
    in_full,
    narrowed,
    widened,
)


def down_widths(config: NetConfig) -> list[list[tuple[int, int]]]:
    """(in, out) channels of each residual block on the way down, per level."""
    levels, previous = [], config.block_out_channels[0]
    for out in config.block_out_channels:
        levels.append([(previous if i == 0 else out, out) for i in range(config.layers_per_block)])
        previous = out
    return levels


def up_widths(config: NetConfig) -> list[list[tuple[int, int]]]:
    """(in, out) channels of each residual block on the way up, per level; in counts the skip connection."""
    reverse = config.block_out_channels[::-1]
    levels, previous = [], reverse[0]
    for level, out in enumerate(reverse):
        skip_below = reverse[min(level + 1, len(reverse) - 1)]
        layers = config.layers_per_block + 1
        levels.append(
            [((previous if i == 0 else out) + (skip_below if i == layers - 1 else out), out) for i in range(layers)]
        )
        previous = out
    return levels


class Level(nn.Module):
    """Residual blocks of one resolution, with what a net has beside each of them; in the middle one layer of two.

    Args:
        widths: (in, out) channels of each residual block.
        beside: makes the other modules, lists by name.
        resample: "down" or "up" after the last layer.
    """

    resnets: Any

    def __init__(
        self,
        widths: Sequence[tuple[int, int]],
        config: NetConfig,
        beside: Callable[[], dict[str, nn.ModuleList]],
        resample: str = "",
        ops: Any = nn,
    ):
        super().__init__()
        time_dim, dim = config.block_out_channels[0] * 4, widths[-1][1]
        self.resnets = nn.ModuleList(
            ResnetBlock(a, b, time_dim, config.norm_num_groups, config.norm_eps, ops) for a, b in widths
        )
        # In this order, by which seeds give weights, and optimisers' states know parameters.
        for name, modules in beside().items():
            setattr(self, name, modules)
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(dim, ops)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(dim, ops)])


class UNet(nn.Module):
    """Levels down, one in the middle, levels up. Parameters are named as in Stable Diffusion's UNet.

    Args:
        config: sizes.
        level: makes a level: (place, index of the resolution with 0 the finest, widths, resample), place one of "down",
            "mid" and "up".
        ops: namespace of layer classes.
    """

    conv_in: Any
    down_blocks: Any
    mid_block: Any
    up_blocks: Any

    def __init__(
        self, config: NetConfig, level: Callable[[str, int, Sequence[tuple[int, int]], str], Level], ops: Any = nn
    ):
        super().__init__()
        self.config = config
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.conv_in = ops.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], ops)
        self.down_blocks = nn.ModuleList(
            level("down", i, widths, "down" if i < last else "") for i, widths in enumerate(down_widths(config))
        )
        self.mid_block = level("mid", last, [(channels[-1], channels[-1])] * 2, "")
        self.up_blocks = nn.ModuleList(
            level("up", last - i, widths, "up" if i < last else "") for i, widths in enumerate(up_widths(config))
        )

    def layers(self) -> Iterator[tuple[Any, int, int]]:
        """(level module, number of the layer in it, resolution) in execution order: down, middle, up. The middle is one
        layer.
        """
        last = len(self.down_blocks) - 1
        for resolution, level in enumerate(self.down_blocks):
            yield from ((level, i, resolution) for i in range(len(level.resnets)))
        yield self.mid_block, 0, last
        for i, level in enumerate(self.up_blocks):
            yield from ((level, j, last - i) for j in range(len(level.resnets)))

    def time_shifts(self, timestep: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """What the time embedding [T] of timesteps 0 (clean) to 1000 (noise) adds in every residual block, [T, C]."""
        time = self.time_embedding(timestep, dtype)
        levels = (*self.down_blocks, self.mid_block, *self.up_blocks)
        return [resnet.shift(time) for level in levels for resnet in level.resnets]

    def walk(
        self, maps: Tensor, shifts: Sequence[Tensor], beside: Callable[[Any, int, Tensor], Tensor], norm: Any
    ) -> Tensor:
        """Down, through the middle and up.

        Args:
            maps: [R, in_channels, h, w]. In a finer format than the weights, they are carried in it between layers.
            shifts: of `time_shifts`.
            beside: what stands beside residual block number i of a level: (level, i, x) -> x. It may return more rows
                than it is given, where they do not differ before: a multiple.
            norm: a norm of the net, whose format is that of the layers.

        Returns:
            [R, C, h, w], what the last layer made.
        """
        # None where there is nothing finer to carry, as in training.
        carried = maps.dtype if norm.weight.dtype.itemsize < maps.dtype.itemsize else None
        shift = iter(shifts)

        def layer(level: Any, i: int, x: Tensor) -> Tensor:
            return beside(level, i, level.resnets[i](x, next(shift), carried))

        def resampled(resample: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            # Carried on as x is, or, where kernels read it as it comes, not.
            return widened(resample(narrowed(x, norm)), x.dtype, norm)

        x = in_full(self.conv_in, as_laid_out(maps))
        skips = [narrowed(x, norm)]  # nothing is added to them
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = layer(level, i, x)
                skips.append(narrowed(x, norm))
            if hasattr(level, "downsamplers"):
                x = resampled(level.downsamplers[0], x)
                skips.append(narrowed(x, norm))
        x = layer(self.mid_block, 0, x)
        x = self.mid_block.resnets[1](x, next(shift), carried)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                skip = of_every_row(skips.pop(), len(x))
                x = layer(level, i, torch.cat([narrowed(x, norm), skip], dim=1))
            if hasattr(level, "upsamplers"):
                x = resampled(partial(level.upsamplers[0], size=skips[-1].shape[2:]), x)
        return x


def of_every_row(x: Tensor, rows: int) -> Tensor:
    """Rows that were computed once, because they do not differ yet, for all: [R, C, h, w] -> [rows, C, h, w]."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))  # in memory as x is
