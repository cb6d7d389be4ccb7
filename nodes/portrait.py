"""The portrait: encoded for sampling; cut out of a larger picture, and laid back into it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..memo_core.errors import PortraitError
from ..memo_core.pipeline import MemoPipeline
from ..memo_core.release import CROP_MARGIN
from ..memo_core.video.clips import ImageClip, over_white
from ..memo_core.video.compose import Box, Frame, centre_square, crop_square, face_square, paste_back
from .clips import AnyClip, image_clip
from .host.media import one_picture, opaque, preview
from .host.placement import refuse_without_room
from .host.progress import stop_if_interrupted
from .wires import CATEGORY, MemoBox, MemoClip, MemoModel, MemoReference, one_of

LARGEST_FACE = -1
AS_TRAINED = -1.0  # margin
LARGEST_SIZE = 2048  # pixels
CROPS = ("face", "none")


def alpha_mask_input() -> io.Input:
    """Optional and last, so that graphs from before there was one still load."""
    return io.Mask.Input(
        "alpha_mask",
        optional=True,
        tooltip="MASK of Load Image: 1 where the picture is transparent. Those parts become white. For a cut-out; not "
        "for a mask that was painted.",
    )


class EncodeReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_EncodeReference",
            display_name="MEMO Encode Reference",
            category=CATEGORY,
            description="Turns a portrait into the reference that a talking head is made from: finds and crops the "
            "face (avatar).",
            inputs=[
                MemoModel.Input("model", tooltip="From Load MEMO."),
                io.Image.Input(
                    "image", tooltip="One picture of a face, seen from the front. Transparent parts become white."
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=LARGEST_SIZE,
                    step=64,
                    tooltip="Side of the square video in pixels, a multiple of 64. 0: as the checkpoint was trained.",
                ),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default="face",
                    tooltip="face: cut around the face (or its mask). none: the middle of the picture.",
                ),
                io.Float.Input(
                    "margin",
                    default=AS_TRAINED,
                    min=AS_TRAINED,
                    max=5.0,
                    step=0.05,
                    tooltip="Room left at each side of the face, in parts of the face's size. -1: as the "
                    "checkpoint was trained, else 0.35.",
                ),
                io.Int.Input(
                    "face_index",
                    default=LARGEST_FACE,
                    min=LARGEST_FACE,
                    max=99,
                    tooltip="Which of several faces: 0 is the largest, 1 the next. -1 takes the largest, if there is "
                    "one.",
                ),
                io.Mask.Input("face_mask", optional=True, tooltip="Where the face is, if it is not found by itself."),
                alpha_mask_input(),
            ],
            outputs=[
                MemoReference.Output(display_name="reference", tooltip="The portrait as the networks see it."),
                io.Image.Output(display_name="crop", tooltip="What was cut out."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, size: int = 0, crop: str = "face") -> bool | str:
        if size % 64 or not 0 <= size <= LARGEST_SIZE:
            return f"size is {size}; it must be a multiple of 64 up to {LARGEST_SIZE}, or 0"
        return one_of(crop=(crop, CROPS))

    @classmethod
    def execute(
        cls,
        model: MemoPipeline,
        image: Tensor,
        size: int,
        crop: Literal["face", "none"],
        margin: float,
        face_index: int,
        face_mask: Tensor | None = None,
        alpha_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        chosen = face_index != LARGEST_FACE
        if chosen and model.face_analyzer is None:
            raise PortraitError(
                f"face_index is {face_index}, but the checkpoint has no face models to find faces with: set face_index "
                "to -1, or paint a face_mask"
            )
        reference = model.encode_reference(
            one_picture(image, alpha_mask),
            size=size or model.default_size,
            crop=crop,
            margin=None if margin < 0 else margin,
            face_index=face_index if chosen else None,
            face_box=None if face_mask is None else one_mask(face_mask, image),
            no_face="error" if chosen else "warn",
        )
        cut = (reference.pixels.permute(1, 2, 0) + 1)[None] / 2
        return io.NodeOutput(reference, cut, ui=preview(cut, cls))


class CropPortrait(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_CropPortrait",
            display_name="MEMO Crop Portrait",
            category=CATEGORY,
            description="Cuts a square with the face out of a picture of any shape: full body, several people. MEMO "
            "Paste Back lays the talking face into the picture again.",
            inputs=[
                io.Image.Input("image", tooltip="The whole picture. Transparent parts become white."),
                io.Int.Input(
                    "face_index",
                    default=LARGEST_FACE,
                    min=LARGEST_FACE,
                    max=99,
                    tooltip="With a model that finds faces: 0 is the largest, 1 the next. -1: the largest, if any.",
                ),
                io.Float.Input(
                    "margin",
                    default=AS_TRAINED,
                    min=AS_TRAINED,
                    max=5.0,
                    step=0.05,
                    tooltip="Room left at each side of the face or mask, in parts of its size. -1: as the "
                    "checkpoint was trained, else 0.35.",
                ),
                io.Float.Input(
                    "center_x",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Middle of the square, in parts of the picture's width; used where no face is known.",
                ),
                io.Float.Input(
                    "center_y",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Middle of the square, in parts of the picture's height; used where no face is known.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.05,
                    max=1.0,
                    step=0.01,
                    tooltip="Side of the square, in parts of the picture's shorter side; used where no face is known.",
                ),
                MemoModel.Input("model", optional=True, tooltip="Finds the face, if the checkpoint has face models."),
                io.Mask.Input("face_mask", optional=True, tooltip="Where the face is; goes before all else."),
                alpha_mask_input(),
            ],
            outputs=[
                io.Image.Output(display_name="crop", tooltip="The square, for MEMO Encode Reference (crop: none)."),
                MemoBox.Output(display_name="box", tooltip="Where it was, for MEMO Paste Back."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        face_index: int,
        margin: float,
        center_x: float,
        center_y: float,
        scale: float,
        model: MemoPipeline | None = None,
        face_mask: Tensor | None = None,
        alpha_mask: Tensor | None = None,
    ) -> io.NodeOutput:
        image = opaque(image, alpha_mask)
        size = (image.shape[1], image.shape[2])
        if margin < 0:
            margin = CROP_MARGIN if model is None else model.crop_margin
        face = one_mask(face_mask, image) if face_mask is not None else find_face(model, image, face_index)
        box = centre_square(size, center_x, center_y, scale) if face is None else face_square(size, face, margin)
        crop = crop_square(image, box)
        return io.NodeOutput(crop, box, ui=preview(crop[:1], cls))


class PasteBack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_PasteBack",
            display_name="MEMO Paste Back",
            category=CATEGORY,
            description="Lays a talking face back into the picture it was cut from, with a soft edge. Several "
            "speakers: once for each, one after the other; who has nothing to say keeps still.",
            inputs=[
                io.MultiType.Input(
                    "clip", [MemoClip, io.Image], tooltip="The talking face. Where it is transparent the picture shows."
                ),
                io.Image.Input(
                    "picture",
                    tooltip="The whole picture, or frames that already hold another speaker. Transparent parts become "
                    "white.",
                ),
                MemoBox.Input("box", tooltip="From MEMO Crop Portrait."),
                io.Float.Input(
                    "feather",
                    default=0.1,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip="Width of the soft edge, in parts of the square.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The whole picture, talking.")],
        )

    @classmethod
    def execute(cls, clip: AnyClip | Tensor, picture: Tensor, box: Box, feather: float) -> io.NodeOutput:
        pictures = image_clip("picture", picture).images
        frames: Iterable[Frame] | Tensor
        if isinstance(clip, Tensor):
            clip = image_clip("clip", clip)
            frames = clip.images
        else:  # a clip's frames are opaque, but those that came back from elsewhere
            frames = clip.images if isinstance(clip, ImageClip) and clip.images.shape[3] == 4 else clip.frames()
        count = max(clip.num_frames, len(pictures))
        refuse_without_room(12 * count * box.height * box.width, f"{count} frames of {box.width}x{box.height}")
        below = pictures if pictures.shape[3] == 3 else (over_white(frame[None])[0] for frame in pictures)
        images = torch.empty(count, box.height, box.width, 3)
        for number, frame in enumerate(paste_back(frames, below, box, feather)):
            if number % 16 == 0:
                stop_if_interrupted()
            images[number] = frame
        return io.NodeOutput(images)


def find_face(model: MemoPipeline | None, image: Tensor, face_index: int) -> tuple | None:
    """The box of a face, by the checkpoint's face models; None where there are none, or no face and none was asked."""
    if model is None or model.face_analyzer is None:
        if face_index != LARGEST_FACE:
            raise PortraitError(
                f"face_index is {face_index}, but there are no face models to find faces with: connect a model whose "
                "checkpoint has them, or set face_index to -1 and place the square by center_x, center_y and scale"
            )
        return None
    pixels = (image[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    faces = model.face_analyzer.detect(pixels)
    index = max(face_index, 0)
    if index < len(faces):
        return faces[index].box
    if face_index == LARGEST_FACE:
        return None
    raise PortraitError(f"face_index is {face_index}, but {len(faces)} faces were found; 0 is the largest")


def one_mask(mask: Tensor, image: Tensor) -> Tensor:
    """A MASK of the picture's size, [H, W]; PortraitError for another size."""
    if tuple(mask.shape[-2:]) != (image.shape[1], image.shape[2]):
        raise PortraitError(
            f"face_mask is {mask.shape[-1]}x{mask.shape[-2]} pixels and the picture {image.shape[2]}x{image.shape[1]}: "
            "paint the mask on this picture (MaskEditor)"
        )
    return mask.reshape(-1, *mask.shape[-2:])[0].cpu()
