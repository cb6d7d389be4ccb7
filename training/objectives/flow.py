"""The loss of a batch: what the networks are shown, and how far off they are (MEMO sections 3 and 4.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from memo_core.memory import recurrence
from memo_core.nets.conditions import Conditions
from memo_core.nets.past import Memory, MemoryOfModule
from memo_core.nets.temporal import TemporalModule

from .. import losses
from ..batches import Batch
from ..config import Loss
from ..nets import Nets


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
            # Each module sums in its own forward, where FSDP2 has gathered its weights; again, where it recomputes.
            memory = list(memory_of_modules(nets, batch.past[order], tokens, batch.past_windows[order]))

        clean, sigma = batch.latents[order], batch.sigma[order]
        level = sigma.view(count, 1, frames, 1, 1)
        noisy, velocity = losses.noised(clean, batch.noise[order], level)
        predicted = nets.diffusion_net.predict(
            noisy,
            sigma.flatten() * 1000,
            Conditions(
                reference=reference,
                face_tokens=tokens,
                audio_tokens=audio_tokens,
                emotion=emotion,
                frames=frames,
            ),
            memory,
        )
        focus = 1 + (self.loss.focus_weight - 1) * batch.focus[order].view(count, 1, 1, height, width)
        loss, error = losses.flow_errors(predicted.float(), velocity, level, focus, self.loss)
        back = order.argsort()
        # `unused` is zero: it keeps the Reference Net in the graph of a process whose samples all go without it.
        return (loss + unused)[back], error[back].masked_fill(damaged, math.inf)


def memory_of(nets: Nets, past: Tensor, face_tokens: Tensor, windows: Tensor | None = None) -> list[Memory]:
    """Memory of past windows, as sampling makes it of a state, one pair per temporal layer.

    Args:
        nets: the networks.
        past: [B, P * F, 4, h, w] latents, oldest first; F is the networks' window.
        face_tokens: [B, tokens, C].
        windows: [B] how many of the last windows count, 0 to P; None: all.
    """
    return [memory for module in memory_of_modules(nets, past, face_tokens, windows) for memory in module()]


def memory_of_modules(
    nets: Nets, past: Tensor, face_tokens: Tensor, windows: Tensor | None = None
) -> Iterator[MemoryOfModule]:
    """`memory_of`, still to be computed: for each temporal module a function that does so.

    At released sizes the sums of a sample are gigabytes, and what the backward pass needs of them is more: a module
    that computes its activations again computes its memory again with them.
    """
    batch, frames, _, height, width = past.shape
    with torch.no_grad():  # the past is given: only what the temporal layers make of it is learned
        rows = face_tokens.detach().repeat_interleave(frames, dim=0)
        features = nets.reference_net(past.flatten(0, 1), rows)
    for (level, index, resolution), feature in zip(nets.diffusion_net.layers(), features, strict=False):
        module = level.temporal(index)
        if module is None:
            continue
        if feature.device.type == "cpu":  # where group norm crashes in backward if its input alone needs no gradient
            feature.requires_grad_(torch.is_grad_enabled())
        size = (-(-height // 2**resolution), -(-width // 2**resolution))
        window = nets.diffusion_net.config.window
        yield partial(_memory_of_module, module, feature.unflatten(0, (batch, frames)), size, window, windows)


def _memory_of_module(
    module: TemporalModule, features: Tensor, size: tuple[int, int], window: int, windows: Tensor | None
) -> list[Memory]:
    memory: list[Memory] = []
    count = features.shape[1] // window
    for number in range(count):
        part = features[:, number * window :][:, :window].flatten(0, 1)
        past = module.past(part, *size, window)
        layers = [(layer.carries, layer.carries.of_window(key, value)) for layer, key, value in past]
        if windows is not None:
            counts = (windows >= count - number).to(layers[0][1][0].dtype).view(-1, 1, 1, 1)
            layers = [(carries, (kv * counts[..., None], z * counts)) for carries, (kv, z) in layers]
        if memory:
            added = zip(layers, memory, strict=True)
            memory = [carries.add(before, recurrence.faded(window), new) for (carries, new), before in added]
        else:
            memory = [new for _, new in layers]
    return memory
