"""The loss of a batch: what the networks are shown, and how far off they are (MEMO sections 3 and 4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor, nn

from memo_core.nets.memory_module import Memory, MemoryModule
from memo_core.release import DECAY, WINDOW

from . import losses
from .batches import Batch
from .config import Loss
from .nets import Nets


class FlowModel(nn.Module):
    """The networks with their loss as `forward`, so that an engine can wrap all of it.

    Args:
        nets: what learns.
        loss: settings of the loss.
    """

    def __init__(self, nets: Nets, loss: Loss):
        super().__init__()
        self.nets, self.loss = nets, loss

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss [B] of each sample, and the error [B] that the robust filter judges it by (infinite: damaged data)."""
        nets = self.nets
        batch, damaged = batch.without_damaged()
        count, _, frames, height, width = batch.latents.shape
        # The net expects rows without a reference first.
        order = batch.no_reference.int().argsort(descending=True, stable=True)
        unconditional = int(batch.no_reference.sum())

        # As in guidance's unconditional row, where there is neither a portrait nor a face embedding.
        tokens = nets.image_proj((batch.face_embedding * ~batch.no_reference[:, None])[order])
        reference = nets.reference_net(batch.portrait[order], tokens)
        unused = sum(feature.sum() * 0 for feature in reference) if unconditional == count else 0
        reference = [feature[unconditional:] for feature in reference]
        audio_tokens = emotion = memory = None
        if batch.audio is not None:
            audio_tokens = nets.audio_proj(batch.audio[order]) * ~batch.no_audio[order].view(-1, 1, 1, 1)
            emotion = batch.emotion[order]
            parts = memory_sums(nets, batch.past[order], tokens, batch.past_windows[order])
            # Each module sums in its own forward, where FSDP2 has gathered its weights; again, where it recomputes.
            if getattr(nets, "recomputes", False):
                memory = [sums for sums, layers in parts for _ in range(layers)]
            else:
                memory = [layer for sums, layers in parts for layer in _summed_once(sums, layers)]

        clean, sigma = batch.latents[order], batch.sigma[order]
        level = sigma.view(count, 1, frames, 1, 1)
        noisy, velocity = losses.noised(clean, batch.noise[order], level)
        predicted = nets.diffusion_net.predict(
            noisy,
            sigma.flatten() * 1000,
            reference=reference,
            memory=memory,
            face_tokens=tokens,
            audio_tokens=audio_tokens,
            emotion=emotion,
        )
        focus = 1 + (self.loss.focus_weight - 1) * batch.focus[order].view(count, 1, 1, height, width)
        loss, error = losses.flow_errors(predicted.float(), velocity, level, focus, self.loss)
        back = order.argsort()
        # `unused` is zero: it keeps the Reference Net in the graph of a process whose samples all go without it.
        return (loss + unused)[back], error[back].masked_fill(damaged, math.inf)


def memory_of(nets: Nets, past: Tensor, face_tokens: Tensor, windows: Tensor | None = None) -> list[Memory]:
    """Memory of past windows, decayed and summed as `memo_core.memory` does, one (kv, z) per memory layer.

    Args:
        past: [B, P * 16, 4, h, w] latents, oldest first.
        face_tokens: [B, tokens, C].
        windows: [B] how many of the last windows count, 0 to P; None: all.
    """
    return [memory for sums, _ in memory_sums(nets, past, face_tokens, windows) for memory in sums()]


def memory_sums(
    nets: Nets, past: Tensor, face_tokens: Tensor, windows: Tensor | None = None
) -> Iterator[tuple[Callable[[], list[Memory]], int]]:
    """`memory_of`, still to be summed: for each memory module a function that does so, and its number of layers.

    At released sizes the sums of a sample are gigabytes, and what the backward pass needs of them is more: a module
    that computes its activations again can compute its sums again with them.
    """
    batch, frames, _, height, width = past.shape
    with torch.no_grad():  # the past is given: only what the memory layers make of it is learned
        rows = face_tokens.detach().repeat_interleave(frames, dim=0)
        features = nets.reference_net(past.flatten(0, 1), rows)
    for (block, index, level), feature in zip(nets.diffusion_net.layers(), features):
        module = block.memory_module(index)
        if module is None:
            continue
        if feature.device.type == "cpu":  # where group norm crashes in backward if its input alone needs no gradient
            feature.requires_grad_(torch.is_grad_enabled())
        size = (-(-height // 2**level), -(-width // 2**level))
        yield partial(_sums, module, feature.unflatten(0, (batch, frames)), size, windows), module.num_memory_layers


def _summed_once(sums: Callable[[], list[Memory]], layers: int) -> list[Callable[[], Memory]]:
    """For each layer of a memory module a function giving its pair; the first one called sums for all."""
    once = cache(sums)
    return [partial(lambda layer: once()[layer], layer) for layer in range(layers)]


def _sums(module: MemoryModule, features: Tensor, size: tuple[int, int], windows: Tensor | None) -> list[Memory]:
    memory: list[Memory] = []
    count = features.shape[1] // WINDOW
    for number in range(count):
        sums = list(module.sums(features[:, number * WINDOW :][:, :WINDOW].flatten(0, 1), *size, WINDOW))
        if windows is not None:
            counts = (windows >= count - number).to(sums[0][0].dtype).view(-1, 1, 1, 1)
            sums = [(kv * counts[..., None], z * counts) for kv, z in sums]
        if memory:
            sums = [(kv * DECAY**WINDOW + a, z * DECAY**WINDOW + b) for (kv, z), (a, b) in zip(memory, sums)]
        memory = sums
    return memory
