"""The released schedule: the same windows as memo_core's, by the work that the released code does for them.

What every gain is measured against. Nothing is saved here that the released code (memoavatar/memo, January 2025) does
not save: the portrait and each past frame are encoded again for every window, one frame at a time; reference and face
tokens are repeated for every frame and projected at every step; the unconditional rows attend with the reference
first and without it again; emotions, time embeddings and the past frames' queries, keys and values are computed at
every step; the first window's memory is reset and summed at every step. Tensors travel as there, [B, C, F, h, w]
between modules, heads in the batch inside attention, with the copies this brings. torch's
scaled_dot_product_attention stands in for xformers'. It exists to be measured, and is checked to give equal numbers.

Only parameter-holding layers of the networks are called, under the names that the checkpoint gives them: networks whose
layers were fused (`memo_core.optimise`) have others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memo_core.checkpoint.networks import Networks
from memo_core.kernels.naive import MIN_NORMALISER
from memo_core.memory.state import MemoryState
from memo_core.release import DECAY, NULL_EMOTION, WINDOW
from memo_core.sampling.job import Job
from memo_core.sampling.noise import window_noise

from .timing import Part, unmeasured

SCALE = 1.0  # output_scale_factor and rescale_output_factor: the released code divides by them everywhere

# What the time goes to; `DIFFUSION_STEP` encloses those that belong to a step.
REFERENCE_NET, DIFFUSION_STEP = "reference net", "diffusion step"
RESIDUAL, SPATIAL, AUDIO = "residual blocks", "spatial attention", "audio attention"
MEMORY_INPUTS, MEMORY = "memory inputs", "memory attention"
VAE_ENCODE, VAE_DECODE = "vae encode", "vae decode"


@dataclass(frozen=True, eq=False)
class ReleasedWindow:
    """latents [4, F, h, w] float32 scaled, and frames [F, 3, H, W] in [0, 1], both on the CPU."""

    latents: Tensor
    frames: Tensor


@torch.no_grad()
def sample_released(nets: Networks, job: Job, part: Part = unmeasured) -> Iterator[ReleasedWindow]:
    """Samples a job's windows as the released code does.

    Args:
        job: a new video with guidance, one emotion per window and the released order of face tokens; nothing else can
            be sampled this way.
        part: entered around every part of the work, by name.

    Raises:
        ValueError: the job is another one.
    """
    job = job.checked(nets)
    settings = job.settings
    released = settings.guided and settings.emotion_per == "window" and settings.face_token_rows == "released"
    if not released or not job.memory.is_empty or job.memory.horizon is not None:
        raise ValueError(
            "the released schedule needs guidance above 1, one emotion per window, released face token rows and an "
            f"empty memory without a horizon; received {settings} and a memory of {len(job.memory.entries)} windows "
            f"with horizon {job.memory.horizon}"
        )
    net = _DiffusionNet(nets.diffusion_net, part)
    portrait, frames = job.reference.pixels[None], None
    for index in range(job.windows):
        inputs = job.inputs(index, MemoryState.empty())
        past = portrait.repeat(WINDOW, 1, 1, 1) if frames is None else frames * 2 - 1
        noise = inputs.noise
        if noise is None:
            noise = window_noise(settings.seed, inputs.start, (4, WINDOW, *job.reference.latents.shape[2:]))
        latents = _sample_window(
            nets,
            net,
            torch.cat([portrait, past]),
            noise[None],
            inputs.audio,
            inputs.emotion,
            job.reference.face_embedding,
            settings.steps,
            settings.guidance_scale,
            new_audio=index == 0,
            part=part,
        )
        with part(VAE_DECODE):
            frames = _decode(nets.vae, latents)
        yield ReleasedWindow(latents[0, :, : inputs.frames].float().cpu(), frames[: inputs.frames])


def _sample_window(
    nets: Networks,
    net: _DiffusionNet,
    pictures: Tensor,
    noise: Tensor,
    audio: Tensor,
    emotion: Tensor,
    face_embedding: Tensor,
    steps: int,
    guidance_scale: float,
    new_audio: bool,
    part: Part,
) -> Tensor:
    """pictures [1 + F, 3, H, W] in [-1, 1]: portrait and past frames; noise [1, 4, F, h, w] -> latents like it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    device, dtype = nets.device, nets.diffusion_net.conv_in.weight.dtype
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps, device=device)
    face = face_embedding.to(device, dtype)
    face_tokens = torch.cat([nets.image_proj(torch.zeros_like(face)), nets.image_proj(face)])
    audio_tokens = nets.audio_proj(audio[None].to(device, dtype))
    audio_tokens = torch.cat([torch.zeros_like(audio_tokens), audio_tokens])
    with part(VAE_ENCODE):
        pictures = pictures.to(device, nets.vae.encoder.conv_in.weight.dtype)
        means = [nets.vae.encode(picture[None]).latent_dist.mean for picture in pictures]
        pictures_latents = torch.cat(means).to(dtype) * nets.vae.config.scaling_factor
    latents = noise.to(device, dtype)
    for step, timestep in enumerate(scheduler.timesteps):
        if step == 0:
            with part(REFERENCE_NET):
                features = _reference_features(nets.reference_net, pictures_latents.repeat(2, 1, 1, 1), face_tokens)
        with part(DIFFUSION_STEP):
            label = torch.tensor(torch.mode(emotion.flatten()).values.item(), dtype=torch.int, device=device)
            label = torch.stack([torch.full_like(label, NULL_EMOTION), label])
            unconditional = torch.tensor([1] * WINDOW + [0] * WINDOW, dtype=torch.float32).to(device).bool()
            velocity = net(
                torch.cat([latents] * 2),
                timestep,
                features,
                face_tokens,
                audio_tokens,
                label,
                unconditional,
                resets=new_audio,
                updates=step == 0,
            )
            without, within = velocity.chunk(2)
            velocity = without + guidance_scale * (within - without)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def _decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """[1, 4, F, h, w] -> [F, 3, H, W] in [0, 1] on the CPU."""
    latents = (1 / vae.config.scaling_factor * latents).transpose(1, 2).flatten(0, 1)
    latents = latents.to(vae.decoder.conv_in.weight.dtype)
    frames = torch.cat([vae.decode(frame[None]).sample for frame in latents])
    return (frames / 2 + 0.5).clamp(0, 1).cpu().float()


# --- Layers -----------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """[B, C, F, h, w] -> [B * F, C, h, w]."""
    return x.transpose(1, 2).flatten(0, 1)


def _video(x: Tensor, frames: int) -> Tensor:
    """[B * F, C, h, w] -> [B, C, F, h, w]."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def _per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    return _video(layer(_rows(x)), x.shape[2])


def _tokens(x: Tensor) -> Tensor:
    """[R, C, h, w] -> [R, h * w, C], copied."""
    rows, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(rows, height * width, channels)


def _maps(x: Tensor, height: int, width: int) -> Tensor:
    """[R, h * w, C] -> [R, C, h, w], copied."""
    return x.reshape(x.shape[0], height, width, -1).permute(0, 3, 1, 2).contiguous()


def _heads_in_batch(x: Tensor, heads: int) -> Tensor:
    """[R, N, H * D] -> [R * H, N, D], copied."""
    rows, tokens, _ = x.shape
    return x.reshape(rows, tokens, heads, -1).permute(0, 2, 1, 3).reshape(rows * heads, tokens, -1).contiguous()


def _heads_in_channels(x: Tensor, heads: int) -> Tensor:
    """[R * H, N, D] -> [R, N, H * D], copied."""
    rows, tokens, dim = x.shape
    return x.reshape(rows // heads, heads, tokens, dim).permute(0, 2, 1, 3).reshape(rows // heads, tokens, heads * dim)


def _attention(layer: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    context = x if context is None else context
    query, key, value = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    # As four axes, because torch's fused kernels take no other.
    query, key, value = (
        _heads_in_batch(given, layer.heads).unflatten(0, (-1, layer.heads)) for given in (query, key, value)
    )
    out = F.scaled_dot_product_attention(query, key, value).flatten(0, 1)
    return layer.to_out[0](_heads_in_channels(out, layer.heads)) / SCALE


def _joint_attention(layer: nn.Module, x: Tensor, audio: Tensor) -> tuple[Tensor, Tensor | None]:
    """One attention over frame and audio tokens, [R, N, C] and [R, M, A]; the last such layer drops the audio."""
    query = torch.cat([layer.to_q(x), layer.add_q_proj(audio)], dim=1)
    key = torch.cat([layer.to_k(x), layer.add_k_proj(audio)], dim=1)
    value = torch.cat([layer.to_v(x), layer.add_v_proj(audio)], dim=1)
    query, key, value = (given.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for given in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    frames, sound = out[:, : x.shape[1]], out[:, x.shape[1] :]
    return layer.to_out[0](frames), layer.to_add_out(sound) if hasattr(layer, "to_add_out") else None


def _feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    x, gate = layer.net[0].proj(x).chunk(2, dim=-1)
    return layer.net[2](x * F.gelu(gate))


def _time_embedding(layer: nn.Module, timestep: Tensor, rows: int) -> Tensor:
    """A timestep -> [rows, 4 * channels]."""
    half = layer.linear_1.in_features // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angle = timestep.expand(rows).float()[:, None] * exponent.exp()[None]
    embedding = torch.cat([angle.cos(), angle.sin()], dim=-1).to(layer.linear_1.weight.dtype)
    return layer.linear_2(F.silu(layer.linear_1(embedding)))


def _emotion_norm(layer: nn.Module, x: Tensor, emotion: Tensor) -> Tensor:
    """Layer norm with shift and scale from the label; x [B * F, N, C], emotion [B]."""
    embedding = layer.class_embedder.embedding_table(emotion)
    shift, scale = layer.adaLN_modulation[1](F.silu(embedding)).chunk(2, dim=1)
    repeats = x.shape[0] // emotion.shape[0]
    shift, scale = (given[:, None].repeat_interleave(repeats, dim=0) for given in (shift, scale))
    return F.layer_norm(x, x.shape[-1:], eps=1e-5) * (1 + scale) + shift


# --- Reference Net ----------------------------------------------------------------------------------------------------


def _reference_features(net: nn.Module, latents: Tensor, face_tokens: Tensor) -> list[Tensor]:
    """Features [R, N, C] per layer of all rows [R, 4, h, w] at once; the face tokens [2, n, C] alternate over them."""
    time = _time_embedding(net.time_embedding, torch.zeros((), device=latents.device), len(latents))
    x = net.conv_in(latents)
    skips, features = [x], []

    def layer(block: nn.Module, i: int, x: Tensor) -> Tensor:
        x = _still_resnet(block.resnets[i], x, time)
        if hasattr(block, "attentions"):
            x, feature = _still_transformer(block.attentions[i], x, face_tokens)
        else:
            feature = x.flatten(2).transpose(1, 2)
        features.append(feature)
        return x

    for block in net.down_blocks:
        for i in range(len(block.resnets)):
            x = layer(block, i, x)
            skips.append(x)
        if hasattr(block, "downsamplers"):
            x = block.downsamplers[0].conv(x)
            skips.append(x)
    x = layer(net.mid_block, 0, x)
    x = _still_resnet(net.mid_block.resnets[1], x, time)
    for block in net.up_blocks:
        for i in range(len(block.resnets)):
            x = layer(block, i, torch.cat([x, skips.pop()], dim=1))
        if hasattr(block, "upsamplers"):
            x = block.upsamplers[0].conv(F.interpolate(x, size=skips[-1].shape[2:], mode="nearest"))
    return features


def _still_resnet(block: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    hidden = block.conv1(F.silu(block.norm1(x)))
    hidden = hidden + block.time_emb_proj(F.silu(time))[:, :, None, None]
    hidden = block.conv2(F.silu(block.norm2(hidden)))
    shortcut = block.conv_shortcut(x) if hasattr(block, "conv_shortcut") else x
    return (shortcut + hidden) / SCALE


def _still_transformer(module: nn.Module, x: Tensor, face_tokens: Tensor) -> tuple[Tensor | None, Tensor]:
    """-> the maps (None from the net's last one) and the feature [R, N, C]."""
    block = module.transformer_blocks[0]
    hidden = _tokens(module.proj_in(module.norm(x)))
    feature = block.norm1(hidden)
    if not hasattr(block, "attn1"):
        return None, feature
    hidden = _attention(block.attn1, feature) + hidden
    tokens = face_tokens.repeat(len(x) // len(face_tokens), 1, 1)
    hidden = _attention(block.attn2, block.norm2(hidden), tokens) + hidden
    hidden = _feed_forward(block.ff, block.norm3(hidden)) + hidden
    return module.proj_out(_maps(hidden, *x.shape[2:])) + x, feature


# --- Diffusion Net ----------------------------------------------------------------------------------------------------


class _DiffusionNet:
    """One forward pass after the other; keeps the sums of every memory layer from window to window, as there."""

    def __init__(self, net: nn.Module, part: Part):
        self.net, self.part = net, part
        self.sums: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        features: list[Tensor],
        face_tokens: Tensor,
        audio_tokens: Tensor,
        emotion: Tensor,
        unconditional: Tensor,
        resets: bool,
        updates: bool,
    ) -> Tensor:
        """[2, 4, F, h, w] -> velocity.

        features: [2 * (1 + F), N, C] per layer. unconditional: [2 * F] bool. resets: forget, and sum the past frames,
        at this step. updates: sum them.
        """
        self.features, self.face_tokens, self.emotion = iter(features), face_tokens, emotion
        self.unconditional, self.resets, self.updates = unconditional, resets, updates
        self.time = _time_embedding(self.net.time_embedding, timestep, len(latents))
        net, audio = self.net, audio_tokens.flatten(0, 1)
        x = _per_frame(net.conv_in, latents)
        skips = [x]
        for block in net.down_blocks:
            for i in range(len(block.resnets)):
                x, audio = self._layer(block, i, x, audio)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = _per_frame(block.downsamplers[0].conv, x)
                skips.append(x)
        x, audio = self._layer(net.mid_block, 0, x, audio)
        x = self._resnet(net.mid_block.resnets[1], x)
        for block in net.up_blocks:
            for i in range(len(block.resnets)):
                x, audio = self._layer(block, i, torch.cat([x, skips.pop()], dim=1), audio)
            if hasattr(block, "upsamplers"):
                x = self._upsample(block.upsamplers[0], x, skips[-1].shape[2:])
        return _per_frame(net.conv_out, F.silu(_per_frame(net.conv_norm_out, x)))

    def _layer(self, block: nn.Module, i: int, x: Tensor, audio: Tensor | None) -> tuple[Tensor, Tensor | None]:
        feature = next(self.features).unflatten(0, (x.shape[0], -1))  # [2, 1 + F, N, C]
        x = self._resnet(block.resnets[i], x)
        if hasattr(block, "attentions"):
            with self.part(SPATIAL):
                x = self._spatial(block.attentions[i], x, feature[:, :1].flatten(0, 1))
            with self.part(AUDIO):
                x, audio = self._audio(block.audio_modules[i], x, audio)
        if hasattr(block, "motion_modules"):
            x = self._memory(block.motion_modules[i].temporal_transformer, x, feature[:, 1:])
        return x, audio

    def _resnet(self, block: nn.Module, x: Tensor) -> Tensor:
        with self.part(RESIDUAL):
            hidden = _per_frame(block.conv1, F.silu(_per_frame(block.norm1, x)))
            hidden = hidden + block.time_emb_proj(F.silu(self.time))[:, :, None, None, None]
            hidden = _per_frame(block.conv2, F.silu(_per_frame(block.norm2, hidden)))
            shortcut = _per_frame(block.conv_shortcut, x) if hasattr(block, "conv_shortcut") else x
            return (shortcut + hidden) / SCALE

    def _upsample(self, block: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
        wide = x.float() if x.dtype == torch.bfloat16 else x
        wide = F.interpolate(wide, size=(x.shape[2], *size[-2:]), mode="nearest").to(x.dtype)
        return _per_frame(block.conv, wide)

    def _spatial(self, module: nn.Module, x: Tensor, reference: Tensor) -> Tensor:
        """x [B, C, F, h, w]; reference [B, N, C]."""
        frames, block = x.shape[2], module.transformer_blocks[0]
        x = _rows(x)
        face_tokens = self.face_tokens.repeat_interleave(frames, dim=0)
        hidden = _tokens(module.proj_in(module.norm(x)))
        normed = block.norm1(hidden)
        # Tiled, so that frames see the two references in turn; DESIGN.md tells more of it.
        context = torch.cat([normed, reference.repeat(frames, 1, 1)], dim=1)
        attended = _attention(block.attn1, normed, context) + hidden
        replaced, mask = attended.clone(), self.unconditional.clone()
        replaced[mask] = _attention(block.attn1, normed[mask], normed[mask]) + hidden[mask]
        hidden = replaced.clone()
        hidden = _attention(block.attn2, block.norm2(hidden), face_tokens) + hidden
        hidden = _feed_forward(block.ff, block.norm3(hidden)) + hidden
        return _video(module.proj_out(_maps(hidden, *x.shape[2:])) + x, frames)

    def _audio(self, module: nn.Module, x: Tensor, audio: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, C, F, h, w]; audio [B * F, n, A]."""
        frames, block, emotion = x.shape[2], module.transformer_blocks[0], self.emotion
        x, sound = _rows(x), audio
        hidden = _tokens(module.proj_in(module.norm(x)))
        normed, normed_sound = (
            _emotion_norm(block.norm1, hidden, emotion),
            _emotion_norm(block.audio_norm1, sound, emotion),
        )
        hidden = _attention(block.attn1, normed) + hidden
        sound = _attention(block.audio_attn1, normed_sound) + sound
        joint, joint_sound = _joint_attention(
            block.attn2, _emotion_norm(block.norm2, hidden, emotion), _emotion_norm(block.audio_norm2, sound, emotion)
        )
        hidden = joint + hidden
        hidden = _feed_forward(block.ff, block.norm3(hidden)) + hidden
        if joint_sound is not None:
            sound = joint_sound + sound
            sound = _feed_forward(block.audio_ff, block.audio_norm3(sound)) + sound
        x = _video(module.proj_out(_maps(hidden, *x.shape[2:])) + x, frames)
        return x, None if joint_sound is None else sound + audio

    def _memory(self, module: nn.Module, x: Tensor, past: Tensor) -> Tensor:
        """x [B, C, F, h, w]; past [B, F, N, C] features of the past frames."""
        frames, past_frames = x.shape[2], past.shape[1]
        x = _rows(x)
        with self.part(MEMORY):
            hidden = module.proj_in(_tokens(module.norm(x)))
        with self.part(MEMORY_INPUTS):
            past = past.flatten(0, 1).transpose(1, 2).contiguous().unflatten(2, x.shape[2:])
            past = module.proj_in(_tokens(module.norm(past)))
        for block in module.transformer_blocks:
            for layer, norm in zip(block.attention_blocks, block.norms):
                with self.part(MEMORY_INPUTS):
                    kv, z = self._memory_sums(layer, norm(past), past_frames)
                with self.part(MEMORY):
                    hidden = self._memory_attention(layer, norm(hidden), kv, z, frames) + hidden
            with self.part(MEMORY):
                hidden = _feed_forward(block.ff, block.ff_norm(hidden)) + hidden
        with self.part(MEMORY):
            return _video(_maps(module.proj_out(hidden), *x.shape[2:]) + x, frames)

    def _memory_sums(self, layer: nn.Module, past: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """The memory of a layer: kv [B * N * H, D, D] and z [B * N * H, 1, D]; past [B * F, N, C] is projected, used
        or not.
        """
        past = _by_location(past, frames)
        query, key, value = (_heads_in_batch(to(past), layer.heads) for to in (layer.to_q, layer.to_k, layer.to_v))
        del query  # nothing reads it
        key = key.softmax(dim=-2)
        if self.resets:
            self.sums.pop(layer, None)
        if self.resets or self.updates:
            age = torch.arange(frames - 1, -1, -1, device=key.device, dtype=key.dtype)
            weight = (DECAY**age).view(1, frames, 1)
            key, value = key * weight, value * weight
            kv, z = torch.einsum("bij,bik->bjk", key, value), key.sum(dim=1).unsqueeze(1)
            if layer in self.sums:
                fade = DECAY**frames
                kv, z = self.sums[layer][0] * fade + kv, self.sums[layer][1] * fade + z
            self.sums[layer] = kv, z
        return self.sums[layer]

    def _memory_attention(self, layer: nn.Module, x: Tensor, kv: Tensor, z: Tensor, frames: int) -> Tensor:
        """x [B * F, N, C] -> the same (MEMO section 4.1, equation 4)."""
        locations = x.shape[1]
        x = _by_location(x, frames)
        query, key, value = (_heads_in_batch(to(x), layer.heads) for to in (layer.to_q, layer.to_k, layer.to_v))
        query, key = query.softmax(dim=-1) * query.shape[-1] ** -0.5, key.softmax(dim=-2)
        kv = DECAY * kv + torch.einsum("bnd,bne->bde", key, value)
        z = DECAY * z + key.sum(dim=-2, keepdim=True)
        numerator = torch.einsum("bnd,bde->bne", query, kv)
        denominator = torch.einsum("bnd,bod->bno", query, z)
        out = layer.to_out[0](_heads_in_channels(numerator / denominator.clamp(min=MIN_NORMALISER), layer.heads))
        return (out / SCALE).unflatten(0, (-1, locations)).transpose(1, 2).flatten(0, 1)


def _by_location(x: Tensor, frames: int) -> Tensor:
    """[B * F, N, C] -> [B * N, F, C], copied."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
