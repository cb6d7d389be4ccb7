"""The host's pictures and sounds: IMAGE, MASK, AUDIO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import comfy.model_management as management
import numpy as np
import torch
from comfy_api.v0_0_2 import ui
from torch import Tensor

from ...memo_core.checks import shown
from ...memo_core.errors import AudioError, MemoError, PortraitError
from ...memo_core.video.clips import Sound, check_finite, over_white

if TYPE_CHECKING:
    from PIL import Image


# --- Pictures and sound -----------------------------------------------------------------------------------------------


def to_pil(picture: Tensor) -> Image.Image:
    """[H, W, 3] in [0, 1] -> PIL."""
    from PIL import Image

    return Image.fromarray((picture.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def to_image(picture: Image.Image) -> Tensor:
    """PIL -> the host's IMAGE [1, H, W, 3]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)[None]


def preview(image: Tensor, node: Any) -> ui.PreviewImage:
    """An IMAGE to be shown on the node."""
    return ui.PreviewImage(image, cls=node)


def one_picture(image: Tensor, alpha_mask: Tensor | None = None) -> Tensor:
    """The single picture of an IMAGE, over white where it is transparent: [3, H, W] in [-1, 1].

    Raises:
        PortraitError: a batch, NaN or infinite values, or a mask that does not fit; see `opaque`.
    """
    if image.ndim != 4 or image.shape[0] != 1 or image.shape[3] not in (3, 4) or 0 in image.shape:
        raise PortraitError(
            f"the portrait must be one picture, IMAGE [1, H, W, 3]; received {list(image.shape)}. "
            "The node ImageFromBatch picks one out of several"
        )
    return opaque(image, alpha_mask)[0].permute(2, 0, 1).float().clamp(0, 1) * 2 - 1


def opaque(images: Tensor, alpha_mask: Tensor | None = None, name: str = "image") -> Tensor:
    """Pictures of an IMAGE, [F, H, W, 3], over white where they are transparent, as the command shows them.

    Args:
        images: [F, H, W, 3] or [F, H, W, 4].
        alpha_mask: MASK [H, W], [1, H, W] or [F, H, W], 1 where the pictures are transparent. Without any such place it
            counts as none, whatever its size: for opaque pictures Load Image gives 64 x 64 zeros.
        name: of the input, for errors.

    Raises:
        PortraitError: another shape, NaN or infinite values, a mask of another size.
    """
    if images.ndim != 4 or images.shape[3] not in (3, 4) or 0 in images.shape:
        raise PortraitError(f"{name} holds pictures [F, H, W, 3] or [F, H, W, 4]; received {list(images.shape)}")
    try:
        check_finite(images)
    except MemoError as error:
        raise PortraitError(f"{name}: {error}") from error
    if alpha_mask is None or not alpha_mask.any():
        return over_white(images)
    if alpha_mask.ndim < 2 or not alpha_mask.isfinite().all():
        raise PortraitError(
            f"alpha_mask is {list(alpha_mask.shape)}{' with NaN or infinite values' if alpha_mask.ndim > 1 else ''}: "
            "connect the MASK of Load Image"
        )
    masks = alpha_mask.reshape(-1, *alpha_mask.shape[-2:])
    if masks.shape[1:] != images.shape[1:3]:
        raise PortraitError(
            f"alpha_mask is {masks.shape[2]}x{masks.shape[1]} pixels and {name} {images.shape[2]}x{images.shape[1]}: "
            "connect the MASK of the Load Image that the picture comes from, scaled and cut as the picture was"
        )
    if len(masks) not in (1, len(images)):
        raise PortraitError(f"alpha_mask holds {len(masks)} masks and {name} {len(images)} pictures: one each, or one")
    return over_white(images, masks)


def sound_of(audio: Mapping[str, Any]) -> Sound:
    """The recording in the host's AUDIO: any mapping, also one that reads its file when it is asked.

    The waveform may be [samples], [channels, samples] or [1, channels, samples], a tensor or an array, of any number
    format that `memo_core.audio` understands.

    Raises:
        AudioError: a batch, no sound, samples that are not finite, a rate that is no rate, or a file that could not be
            read.
    """
    if not isinstance(audio, Mapping):
        raise AudioError(
            f"AUDIO holds a waveform and a sample rate; received {type(audio).__name__}: is there a sound?"
        )
    try:
        waveform, rate = audio["waveform"], audio["sample_rate"]
    except management.InterruptProcessingException:
        raise
    except KeyError as error:
        raise AudioError(
            f"AUDIO holds a waveform and a sample rate; received one without {error}: is there a sound?"
        ) from error
    except Exception as error:  # whatever the pack that reads the file raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise AudioError(f"the sound cannot be read ({reason}): does the video or file have one?") from error
    return Sound(_samples(waveform), _whole_rate(rate))


def _samples(waveform: Any) -> Tensor:
    """One recording as float32 [channels, samples] on the CPU, the same memory where it is that already."""
    from ...memo_core.inputs.sound import as_channels, to_float

    if not isinstance(waveform, Tensor):
        try:
            waveform = torch.from_numpy(np.require(waveform, requirements=["C", "W"]))
        except (TypeError, ValueError) as error:
            raise AudioError(f"the waveform is a {type(waveform).__name__} and no tensor of numbers") from error
    shape = list(waveform.shape)
    if waveform.ndim == 3 and shape[0] == 1:
        waveform = waveform[0]
    if waveform.ndim not in (1, 2):
        raise AudioError(
            f"AUDIO must hold one recording, [1, channels, samples]; received {shape}. Cut a batch into recordings, or "
            "join them one after the other (AudioConcat)"
        )
    if 0 in shape:
        raise AudioError(f"the recording holds no sound: [1, channels, samples] is expected, received {shape}")
    channels = as_channels(waveform)
    if channels.dtype != torch.float32:
        channels = torch.stack([to_float(channel) for channel in channels])
    if not all(math.isfinite(value) for value in channels.aminmax()):
        bad = ~channels.isfinite().all(0)
        raise AudioError(
            f"{int(bad.sum())} of {len(bad)} samples are NaN or infinite, the first is number "
            f"{int(bad.to(torch.uint8).argmax()) + 1}: look at the node that made the sound"
        )
    return channels


def _whole_rate(rate: Any) -> int:
    """The sample rate in whole Hz, of whatever kind of number it is."""
    try:
        hertz = round(float(rate))
    except (OverflowError, RuntimeError, TypeError, ValueError):  # no number, NaN, many
        hertz = 0
    if hertz < 1:
        raise AudioError(f"the sample rate is {shown(rate)}; it must be a positive number of Hz")
    return hertz


def audio_of(sound: Sound) -> dict[str, Any]:
    """The host's AUDIO of a recording."""
    return {"waveform": sound.waveform[None], "sample_rate": sound.sample_rate}
