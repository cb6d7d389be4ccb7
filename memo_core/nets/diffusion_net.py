"""Diffusion Net: the denoising video UNet of MEMO (section 4); the memory goes in and out, never stays inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from .audio import AudioLayer
from .conditions import Conditions, LayerInputs, Prepared
from .config import NetConfig
from .kinds import AUDIO, TEMPORAL, kind_named
from .layers import ResnetBlock, in_full, norm_is_kernel
from .module import LayerModule
from .past import MemoryOfModule
from .spatial import SpatialTransformer
from .temporal import TemporalAttention, TemporalModule
from .unet import Level, UNet, of_every_row


class _Level(Level):
    """One resolution. Beside each residual block, in this order and where the level has them: spatial attention, an
    audio module, a temporal module.
    """

    attentions: Any
    audio_modules: Any
    motion_modules: Any

    def spatial(self, i: int) -> SpatialTransformer | None:
        return self.attentions[i] if hasattr(self, "attentions") else None

    def audio(self, i: int) -> AudioLayer | None:
        return self.audio_modules[i] if hasattr(self, "audio_modules") else None

    def temporal(self, i: int) -> TemporalModule | None:
        return self.motion_modules[i] if hasattr(self, "motion_modules") else None


class DiffusionNet(UNet):
    """Predicts the rectified-flow velocity of a window of frames.

    Args:
        config: sizes, and the kinds of layers.
        ops: namespace of layer classes.
    """

    conv_norm_out: Any

    outside_forward = ("predict",)  # as `LayerModule` declares it

    def __init__(self, config: NetConfig, ops: Any = nn):
        channels = config.block_out_channels

        def level(place: str, resolution: int, widths: Sequence[tuple[int, int]], resample: str) -> Level:
            if place == "mid":  # one layer, and a residual block after it
                dim = widths[0][1]
                mid = _Level(widths[:1], config, lambda: _beside(config, resolution, [dim], [dim], ops), ops=ops)
                mid.resnets.append(ResnetBlock(dim, dim, channels[0] * 4, config.norm_num_groups, config.norm_eps, ops))
                return mid
            dims = [dim for _, dim in widths]
            inner = [a for a, _ in widths] if place == "down" else [channels[max(resolution - 1, 0)]] * len(widths)
            final = place == "up" and resolution == 0

            def beside() -> dict[str, nn.ModuleList]:
                there = config.attention[resolution], config.memory[resolution]
                return _beside(config, resolution, dims, inner, ops, final, *there)

            return _Level(widths, config, beside, resample, ops)

        super().__init__(config, level, ops)
        self.conv_norm_out = ops.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_out = ops.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def layer_modules(self) -> Iterator[LayerModule]:
        """Everything beside the residual blocks."""
        return (module for module in self.modules() if isinstance(module, LayerModule))

    def temporal_modules(self) -> Iterator[TemporalModule]:
        """In execution order."""
        return (module for level, i, _ in self.layers() if (module := level.temporal(i)) is not None)

    @property
    def past_frames(self) -> int | None:
        """How many past frames its layers look at, at most; None: all."""
        needed = [layer.carries.frames for module in self.temporal_modules() for layer in module.layers()]
        return None if None in needed else max((frames for frames in needed if frames is not None), default=0)

    def past(
        self, features: list[Tensor], height: int, width: int, frames: int, rows: Tensor | None = None
    ) -> Iterator[tuple[TemporalAttention, Tensor, Tensor]]:
        """Each temporal layer with its keys and values of a window of past frames, in execution order.

        What becomes of them is `TemporalAttention.carries`' affair.

        Args:
            features: Reference Net features of the past frames, [B * F, N, C] per layer, frames oldest first.
            height, width: latent size; level i of the net works at ceil(size / 2^i).
            frames: F.
            rows: [B * F] numbers of rows of `features`, where some frames are alike and each is there only once.

        Yields:
            (layer, key, value), [B, F, N, H, D] each.
        """
        for (level, i, resolution), feature in zip(self.layers(), features, strict=True):
            module = level.temporal(i)
            if module is not None:
                h, w = -(-height // 2**resolution), -(-width // 2**resolution)
                yield from module.past(feature, h, w, frames, rows)

    def prepare(self, conditions: Conditions) -> Prepared:
        """Computes what does not change between the steps of a window: every module its own part."""
        layers, audio, first = [], None, True
        for index, (level, i, _) in enumerate(self.layers()):
            spatial, audio_module = level.spatial(i), level.audio(i)
            mine = LayerInputs(
                None if spatial is None else spatial.prepare(conditions, index),
                None if audio_module is None else audio_module.prepare(conditions, index),
            )
            layers.append(mine)
            if first and audio_module is not None and mine.audio is not None and conditions.audio_tokens is not None:
                first, audio = False, audio_module.begin(conditions.audio_tokens.flatten(0, 1), mine.audio)
        return Prepared(layers, audio, conditions.frames, len(conditions.face_tokens))

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        memory: Iterable[MemoryOfModule] | None,
    ) -> Tensor:
        """One step, and all that `prepare` and `time_shifts` compute for it.

        Args:
            latents: [B, 4, F, h, w] noisy latents.
            timestep: [B] or [1], or [B * F] for one per frame, 0 (clean) to 1000 (noise).
            conditions: of the window.
            memory: of every temporal module, or None for a window without a past.

        Returns:
            Velocity [B, 4, F, h, w].
        """
        return self(latents, self.time_shifts(timestep, latents.dtype), self.prepare(conditions), memory)

    def forward(
        self, latents: Tensor, shifts: list[Tensor], prepared: Prepared, memory: Iterable[MemoryOfModule] | None
    ) -> Tensor:
        """One step under prepared conditions.

        Args:
            latents: [B, 4, F, h, w] noisy latents; or those of B / 2 videos, which then stand for both halves of the
                batch (guidance) and are computed once as far as the halves do not differ. In a finer format than the
                weights, hidden states are carried in it from layer to layer.
            shifts: of `time_shifts`, for one timestep, or one per row or frame.
            prepared: from `prepare`.
            memory: as for `predict`.

        Returns:
            Velocity [B, 4, F, h, w].
        """
        frames, layers = prepared.frames, iter(prepared.layers)
        remembered = None if memory is None else iter(memory)
        audio = prepared.audio

        def beside(level: _Level, i: int, x: Tensor) -> Tensor:
            nonlocal audio
            mine = next(layers)
            if mine.spatial is not None:
                x = level.attentions[i](of_every_row(x, prepared.batch * frames), mine.spatial)
            if mine.audio is not None:
                x, audio = level.audio_modules[i](x, audio, mine.audio)
            temporal = level.temporal(i)
            if temporal is not None and prepared.audio is not None:
                x = temporal(x, None if remembered is None else next(remembered), frames)
            return x

        x = self.walk(latents.transpose(1, 2).flatten(0, 1), shifts, beside, self.conv_norm_out)
        norm = self.conv_norm_out
        if norm_is_kernel(x, norm):
            weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
            x = kernels.group_norm(x, norm.num_groups, weight, bias, norm.eps, silu=True)
        else:
            x = F.silu(in_full(norm, x))
        x = in_full(self.conv_out, x)
        return x.unflatten(0, (-1, frames)).transpose(1, 2)


def _beside(
    config: NetConfig,
    resolution: int,
    dims: list[int],
    inner: list[int],
    ops: Any,
    final: bool = False,
    attention: bool = True,
    temporal: bool = True,
) -> dict[str, nn.ModuleList]:
    """The modules of a level by the names that the released checkpoint gives their lists.

    Args:
        dims, inner: per layer, channels and the working width of its audio module.
        final: its last layer is the net's last.
        attention: spatial attention and audio modules are there, as they always are in the middle.
        temporal: likewise, temporal modules.
    """
    modules: dict[str, nn.ModuleList] = {}
    if attention:
        kind = config.audio[resolution]
        make = kind_named(AUDIO, kind.name, "audio_modules")
        modules["attentions"] = nn.ModuleList(SpatialTransformer(dim, config, ops) for dim in dims)
        modules["audio_modules"] = nn.ModuleList(
            make(
                dim,
                inner[i],
                config.audio_attention_dim,
                config.heads,
                config.norm_num_groups,
                final and i == len(dims) - 1,
                ops,
            )
            for i, dim in enumerate(dims)
        )
    if temporal:
        of_time = config.temporal[resolution]
        make_temporal = kind_named(TEMPORAL, of_time.name, "temporal_modules")
        modules["motion_modules"] = nn.ModuleList(
            make_temporal(
                dim,
                config.memory_heads,
                config.memory_blocks,
                config.memory_layers_per_block,
                config.norm_num_groups,
                ops,
                frames=of_time.frames or make_temporal.default_frames(config),
                positions=config.positions,
            )
            for dim in dims
        )
    return modules
