"""Face detection, alignment, embedding and cropping, on small ONNX models of the released signature."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from face_models import KEYPOINTS, SIDES, make_analyzer
from PIL import Image

from memo_core.encoders.face import (
    FOLDER,
    TEMPLATE,
    Face,
    FaceAnalyzer,
    _resize,
    _warn_once,
    align,
    similarity_transform,
    suppress_overlaps,
)
from memo_core.errors import CheckpointError, PortraitError
from memo_core.inputs.portrait import prepare_portrait

onnx = pytest.importorskip("onnx", reason="the onnx package, which builds the test models, is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory: pytest.TempPathFactory) -> FaceAnalyzer:
    """Sees red squares of 32 pixels in a 640x640 picture."""
    return make_analyzer(tmp_path_factory.mktemp("checkpoint"), (32,))


def picture(*cells: tuple[int, int], red: int = 255, height: int = 640, width: int = 640) -> np.ndarray:
    """Black, with red squares of 32 pixels at these columns and rows of the 32 pixel grid."""
    image = np.zeros((height, width, 3), np.uint8)
    for column, row in cells:
        image[32 * row : 32 * row + 32, 32 * column : 32 * column + 32, 0] = red
    return image


def expected_box(column: int, row: int, stride: int = 32) -> list[float]:
    x, y = column * stride, row * stride
    return [x - SIDES[0] * stride, y - SIDES[1] * stride, x + SIDES[2] * stride, y + SIDES[3] * stride]


# Detection


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_boxes_and_keypoints_are_decoded_at_every_stride(tmp_path: Path, stride: int) -> None:
    image = np.zeros((640, 640, 3), np.uint8)
    image[10 * stride : 11 * stride, 15 * stride : 16 * stride] = 255, 0, 0
    (face,) = make_analyzer(tmp_path, (stride,)).detect(image)
    np.testing.assert_allclose(face.box, expected_box(15, 10, stride), atol=1e-3)
    np.testing.assert_allclose(face.keypoints, (np.array(KEYPOINTS) + [15, 10]) * stride, atol=1e-3)
    assert face.score == pytest.approx(1 / (1 + np.exp(-10 * (3 * 127.5 / 128 - 2.5))), abs=1e-4)


def test_channels_are_red_green_blue(analyzer: FaceAnalyzer) -> None:
    assert len(analyzer.detect(picture((5, 5)))) == 1
    assert analyzer.detect(picture((5, 5))[..., ::-1].copy()) == []


def test_faces_below_the_threshold_are_not_seen(analyzer: FaceAnalyzer) -> None:
    # Half sure where 10 (R - G - B) = 25: R = 128 (2.5 - 2 * 127.5 / 128) + 127.5 = 192.5
    assert len(analyzer.detect(picture((5, 5), red=193))) == 1
    assert analyzer.detect(picture((5, 5), red=192)) == []


def test_overlapping_boxes_leave_the_surest_and_distant_ones_stay(analyzer: FaceAnalyzer) -> None:
    image = np.maximum(picture((5, 5), red=255), picture((6, 5), (15, 15), red=230))
    faces = sorted(analyzer.detect(image), key=lambda face: face.box)
    assert [list(face.box) for face in faces] == [expected_box(5, 5), expected_box(15, 15)]


def test_suppression_keeps_boxes_that_overlap_by_forty_percent_or_less() -> None:
    boxes = np.array([[0, 0, 99, 99], [43, 0, 142, 99], [0, 42, 99, 141], [300, 300, 320, 320]], np.float32)
    scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    # 57 of 143 columns are shared: 0.399; 58 of 142 rows: 0.408
    assert suppress_overlaps(boxes, scores) == [0, 1, 3]
    assert suppress_overlaps(boxes, scores[::-1].copy()) == [3, 2, 1]
    assert suppress_overlaps(np.zeros((0, 4), np.float32), np.zeros(0, np.float32)) == []


@pytest.mark.parametrize(("height", "width"), [(1280, 1280), (320, 640), (640, 320), (1920, 960), (480, 1280)])
def test_coordinates_are_those_of_the_picture_whatever_its_size(
    analyzer: FaceAnalyzer, height: int, width: int
) -> None:
    scale = max(height, width) / 640
    cell = round(32 * scale)
    image = np.zeros((height, width, 3), np.uint8)
    image[3 * cell : 4 * cell, 4 * cell : 5 * cell, 0] = 255
    (face,) = analyzer.detect(image)
    np.testing.assert_allclose(face.box, np.array(expected_box(4, 3)) * scale, atol=1e-2)
    np.testing.assert_allclose(face.keypoints, (np.array(KEYPOINTS) + [4, 3]) * cell, atol=1e-2)


def test_larger_faces_come_first(tmp_path: Path) -> None:
    analyzer = make_analyzer(tmp_path, (8, 32))
    image = picture()
    image[64:72, 400:408, 0] = 255  # one cell of stride 8, a small face
    image[416:448, 480:512, 0] = 255  # one cell of stride 32, a large face
    boxes = [face.box for face in analyzer.detect(image)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in boxes]
    assert len(areas) >= 2 and areas == sorted(areas, reverse=True)
    np.testing.assert_allclose(boxes[0], expected_box(15, 13), atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5000, 3), (5000, 1, 3), (2, 3, 3)])
def test_tiny_and_thin_pictures_have_no_faces_and_no_trouble(analyzer: FaceAnalyzer, shape: tuple[int, ...]) -> None:
    assert analyzer.detect(np.full(shape, 90, np.uint8)) == []


def test_the_detector_sees_what_opencv_would_have_resized() -> None:
    ramp = np.repeat(np.array([[10], [20], [60], [100]], np.uint8)[:, :, None], 3, 2)
    assert _resize(ramp.transpose(1, 0, 2), 1, 2)[0, :, 0].tolist() == [15, 80]
    assert _resize(ramp, 2, 1)[:, 0, 0].tolist() == [15, 80]
    assert _resize(ramp, 8, 1)[:, 0, 0].tolist() == [10, 13, 18, 30, 50, 70, 90, 100]


def test_the_shorter_side_is_cut_down_to_whole_pixels(analyzer: FaceAnalyzer, monkeypatch: pytest.MonkeyPatch) -> None:
    session, seen = analyzer._detector, []

    class Recorder:
        get_inputs = staticmethod(session.get_inputs)

        def run(self, names: None, inputs: dict[str, np.ndarray]) -> Any:
            seen.append(inputs["input.1"])
            return session.run(names, inputs)

    monkeypatch.setattr(analyzer, "_detector", Recorder())
    analyzer.detect(np.full((337, 1000, 3), 255, np.uint8))  # 215.68 of 640 rows
    analyzer.detect(np.full((1000, 337, 3), 255, np.uint8))
    lying, standing = (network_input[0, 0] > 0 for network_input in seen)
    assert lying.any(1).sum() == 215 and lying.any(0).all()
    assert standing.any(0).sum() == 215 and standing.any(1).all()


# Alignment and embedding


def test_similarity_transform_equals_the_one_of_scikit_image() -> None:
    points = np.array([[203.5, 180.25], [281.0, 171.75], [247.5, 231.0], [215.25, 279.5], [284.0, 268.5]])
    expected = [[0.419619419, -0.0379332937, -38.7246097], [0.0379332937, 0.419619419, -32.3582051]]
    np.testing.assert_allclose(similarity_transform(points, TEMPLATE), expected, rtol=1e-6)
    mirrored = points * [-1, 1] + [500, 0]  # a face cannot be turned over: the best without mirroring is small
    expected = [[0.106767619, -9.02943825e-05, 28.9543025], [9.02943825e-05, 0.106767619, 47.7270325]]
    np.testing.assert_allclose(similarity_transform(mirrored, TEMPLATE), expected, rtol=1e-6, atol=1e-7)


def pattern(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.stack([128 + 80 * np.sin(x / 12), 128 + 80 * np.cos(y / 14), 60 + x / 2 + y / 2], -1)


@pytest.mark.parametrize(("angle", "scale"), [(0, 1), (0, 3), (25, 2.2), (-160, 1.7)])
def test_a_turned_and_scaled_face_is_aligned_and_embedded_as_the_upright_one(
    analyzer: FaceAnalyzer, angle: float, scale: float
) -> None:
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn = scale * np.array([[cosine, -sine], [sine, cosine]])
    shift = np.array([300, 300]) - turn @ [56, 56]
    y, x = np.mgrid[:600, :600]
    template_x, template_y = np.linalg.inv(turn) @ (np.stack([x.ravel(), y.ravel()]) - shift[:, None])
    image = pattern(template_x, template_y).clip(0, 255).round().astype(np.uint8).reshape(600, 600, 3)
    keypoints = TEMPLATE @ turn.T + shift

    y, x = np.mgrid[:112, :112]
    upright = pattern(x, y)
    aligned = align(image, keypoints)
    assert aligned.shape == (112, 112, 3) and aligned.dtype == np.uint8
    assert np.abs(aligned - upright).max() <= 2

    embedding = analyzer.embed(image, Face((0, 0, 1, 1), keypoints.astype(np.float32), 1.0))
    means = ((upright - 127.5) / 127.5).transpose(2, 0, 1).reshape(3, 14, 8, 14, 8).mean((2, 4)).ravel()[:512]
    assert embedding.shape == (512,) and embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, means, atol=0.01)


def test_the_embedder_sees_white_as_one_and_black_as_minus_one(analyzer: FaceAnalyzer) -> None:
    for level, value in ((255, 1), (0, -1)):
        face = Face((0, 0, 112, 112), TEMPLATE.astype(np.float32), 1.0)
        embedding = analyzer.embed(np.full((112, 112, 3), level, np.uint8), face)
        np.testing.assert_allclose(embedding, value, atol=1e-6)


def test_beyond_the_picture_the_aligned_face_is_black() -> None:
    image = np.full((50, 112, 3), 200, np.uint8)
    aligned = align(image, TEMPLATE)
    assert (aligned[:50] == 200).all() and (aligned[50:] == 0).all()


# Absent and damaged models


def test_absent_models_are_logged_once_and_give_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert FaceAnalyzer.from_folder(tmp_path) is None
        assert FaceAnalyzer.from_folder(tmp_path) is None
    assert len(caplog.records) == 1
    assert "scrfd_10g_bnkps.onnx" in caplog.text and "memo download" in caplog.text


def test_absent_onnxruntime_is_logged_once_and_gives_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_analyzer(tmp_path, (32,))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    _warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert FaceAnalyzer.from_folder(tmp_path) is None
        assert FaceAnalyzer.from_folder(tmp_path) is None
    assert len(caplog.records) == 1 and "pip install onnxruntime" in caplog.text


@pytest.mark.parametrize(
    ("device", "there", "expected"),
    [
        ("cpu", True, ["CPUExecutionProvider"]),
        ("cuda", False, ["CPUExecutionProvider"]),
        ("cuda", True, [("CUDAExecutionProvider", {"device_id": 0}), "CPUExecutionProvider"]),
        ("cuda:3", True, [("CUDAExecutionProvider", {"device_id": 3}), "CPUExecutionProvider"]),
    ],
)
def test_networks_run_on_a_gpu_when_told_and_where_onnxruntime_can(
    device: str, there: bool, expected: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    make_analyzer(tmp_path, (32,))
    asked, session = [], onnxruntime.InferenceSession

    def begin(path: str, options: object, providers: list) -> onnxruntime.InferenceSession:
        asked.append(providers)
        return session(path, options, providers=["CPUExecutionProvider"])

    names = ["CUDAExecutionProvider"] * there + ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", begin)
    assert FaceAnalyzer.from_folder(tmp_path, device) is not None
    assert asked == [expected, expected]


def test_damaged_and_exchanged_models_are_checkpoint_errors(tmp_path: Path) -> None:
    make_analyzer(tmp_path, (32,))
    detector, embedder = (tmp_path / FOLDER / name for name in ("scrfd_10g_bnkps.onnx", "glintr100.onnx"))
    good = detector.read_bytes()
    detector.write_bytes(embedder.read_bytes())
    with pytest.raises(CheckpointError, match="1 outputs; SCRFD with keypoints has 9"):
        FaceAnalyzer.from_folder(tmp_path)
    detector.write_bytes(good)
    embedder.write_bytes(good)
    with pytest.raises(CheckpointError, match="ArcFace takes"):
        FaceAnalyzer.from_folder(tmp_path)
    detector.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match=r"scrfd_10g_bnkps\.onnx"):
        FaceAnalyzer.from_folder(tmp_path)


def test_the_models_own_folder_is_accepted_too(tmp_path: Path) -> None:
    make_analyzer(tmp_path, (32,))
    assert FaceAnalyzer.from_folder(tmp_path / FOLDER) is not None


# The portrait


def gradient(height: int, width: int) -> np.ndarray:
    """Every pixel tells where it is: red its column, green its row (in 256ths of the picture)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 256 // width, y * 256 // height, np.full_like(x, 60)], -1).astype(np.uint8)


def test_square_picture_without_crop_equals_the_released_preprocessing(analyzer: FaceAnalyzer) -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    portrait = prepare_portrait(Image.fromarray(image), 128, crop="none")
    # Resize((128, 128)), ToTensor, Normalize([0.5], [0.5]) of torchvision, on a PIL image
    resized = np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.BILINEAR))
    expected = (torch.from_numpy(resized.copy()).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    assert torch.equal(portrait.pixels, expected) and portrait.pixels.dtype == torch.float32
    assert portrait.crop == (0, 0, 300, 300)


def test_the_embedding_is_that_of_the_whole_picture_and_not_scaled(analyzer: FaceAnalyzer) -> None:
    image = np.maximum(gradient(640, 640) // 4, picture((6, 7)))
    for crop in ("face", "none"):
        portrait = prepare_portrait(image, 64, crop=crop, analyzer=analyzer)
        expected = analyzer.embed(image, analyzer.detect(image)[0])
        assert portrait.face_embedding.shape == (1, 512) and portrait.faces_found == 1
        np.testing.assert_array_equal(portrait.face_embedding[0].numpy(), expected)
        assert np.linalg.norm(expected) > 2  # a unit vector would have lost ArcFace's scale
        np.testing.assert_allclose(portrait.box, expected_box(6, 7), atol=1e-3)


@pytest.mark.parametrize("size", [128, (128, 64), (64, 128)])
@pytest.mark.parametrize("margin", [0.0, 0.35, 0.6])
def test_the_crop_has_the_aspect_the_margin_and_the_face_in_its_middle(
    analyzer: FaceAnalyzer, size: int | tuple[int, int], margin: float
) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    portrait = prepare_portrait(picture((10, 10)), size, margin=margin, analyzer=analyzer)
    left, top, right, bottom = portrait.crop
    x0, y0, x1, y1 = expected_box(10, 10)
    assert portrait.pixels.shape == (3, height, width)
    assert (bottom - top) / (right - left) == pytest.approx(height / width, rel=0.01)
    assert (left + right) / 2 == pytest.approx((x0 + x1) / 2, abs=1)
    assert (top + bottom) / 2 == pytest.approx((y0 + y1) / 2, abs=1)
    room = min((right - left) / (x1 - x0), (bottom - top) / (y1 - y0))
    assert room == pytest.approx(1 + 2 * margin, rel=0.02)


def test_a_crop_near_the_border_is_moved_inside(analyzer: FaceAnalyzer) -> None:
    portrait = prepare_portrait(picture((0, 0)), 64, analyzer=analyzer)
    left, top, right, bottom = portrait.crop
    assert (left, top) == (0, 0)
    assert right == bottom == round(2.5 * 32 * 1.7)  # of the face's box what is inside the picture


def test_a_crop_larger_than_the_picture_shrinks_and_at_last_is_padded_with_the_edge() -> None:
    image = gradient(640, 320)
    inside = prepare_portrait(image, 64, face_box=(100, 200, 300, 400), margin=0.5)
    assert inside.crop == (0, 140, 320, 460)  # 400 wanted, 320 are there
    padded = prepare_portrait(image, 64, face_box=(10, 100, 310, 600), margin=0.0)
    assert padded.crop == (-90, 100, 410, 600)
    red = padded.pixels[0]
    assert (red[:, :11] == red[:, :1]).all() and (red[:, -11:] == red[:, -1:]).all()
    assert red[:, 0].mean() == pytest.approx(-1, abs=0.01) and red[:, -1].mean() == pytest.approx(1, abs=0.02)


def test_without_crop_the_centre_is_taken_at_the_wanted_aspect() -> None:
    portrait = prepare_portrait(gradient(300, 900), (64, 128), crop="none")
    assert portrait.crop == (150, 0, 750, 300)
    red = (portrait.pixels[0].mean(0) + 1) * 127.5
    assert red[0] == pytest.approx(256 * 150 / 900, abs=2) and red[-1] == pytest.approx(256 * 750 / 900, abs=2)


def test_several_faces_give_the_largest_or_the_one_asked_for(tmp_path: Path) -> None:
    analyzer = make_analyzer(tmp_path, (8, 32))
    image = picture((15, 13))
    image[64:72, 104:112, 0] = 255
    boxes = [face.box for face in analyzer.detect(image)]
    count = len(boxes)
    assert count >= 2
    assert prepare_portrait(image, 64, analyzer=analyzer).box == boxes[0]
    for index, box in enumerate(boxes):
        portrait = prepare_portrait(image, 64, analyzer=analyzer, face_index=index)
        assert portrait.box == box and portrait.faces_found == count
    with pytest.raises(PortraitError, match=f"face_index is {count}, but {count} faces were found"):
        prepare_portrait(image, 64, analyzer=analyzer, face_index=count)
    with pytest.raises(PortraitError, match="face_index is -1"):
        prepare_portrait(image, 64, analyzer=analyzer, face_index=-1)


def test_no_face_is_one_warning_and_a_zero_embedding_or_an_error(
    analyzer: FaceAnalyzer, caplog: pytest.LogCaptureFixture
) -> None:
    image = gradient(200, 200)
    with caplog.at_level(logging.WARNING):
        portrait = prepare_portrait(image, 64, analyzer=analyzer)
    assert len(caplog.records) == 1 and "no face was found" in caplog.text
    assert portrait.face_embedding.shape == (1, 512) and not portrait.face_embedding.any()
    assert portrait.face_embedding.dtype == torch.float32
    assert portrait.box is None and portrait.faces_found == 0 and portrait.crop == (0, 0, 200, 200)
    with pytest.raises(PortraitError, match="no face was found"):
        prepare_portrait(image, 64, analyzer=analyzer, no_face="error")
    with pytest.raises(PortraitError, match="there are no face models"):
        prepare_portrait(image, 64, no_face="error")


def test_a_given_box_decides_crop_and_embedding(analyzer: FaceAnalyzer, caplog: pytest.LogCaptureFixture) -> None:
    image = picture((4, 4), (14, 14))
    box = (430.0, 430.0, 500.0, 510.0)
    mask = np.zeros((640, 640), np.float32)
    mask[430:510, 430:500] = 1
    second = analyzer.embed(image, min(analyzer.detect(image), key=lambda face: -face.box[0]))
    for given in (box, list(box), torch.tensor(box), mask, torch.from_numpy(mask)[None], mask > 0):
        portrait = prepare_portrait(image, 64, analyzer=analyzer, face_box=given)
        assert portrait.box == box and portrait.faces_found == 2
        np.testing.assert_array_equal(portrait.face_embedding[0].numpy(), second)
        assert portrait.crop[0] < 430 < 500 < portrait.crop[2]
    with caplog.at_level(logging.WARNING):
        elsewhere = prepare_portrait(image, 64, analyzer=analyzer, face_box=(300, 20, 340, 60))
    assert "none of the 2 faces found is inside the given box" in caplog.text
    assert not elsewhere.face_embedding.any() and elsewhere.crop[0] < 300 < 340 < elsewhere.crop[2]
    alone = prepare_portrait(image, 64, face_box=box)  # no models at all
    assert alone.crop == portrait.crop and not alone.face_embedding.any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((50, 50, 50, 80), "must enclose pixels"),
        ((900, 0, 1000, 50), "must enclose pixels"),
        ((float("nan"), 0, 10, 10), "must enclose pixels"),
        ((1, 2, 3), r"shape \[3\]; allowed are four numbers or a mask"),
        (np.zeros((100, 100)), "without any pixel"),
        (np.ones((50, 100)), r"shape \[50, 100\]"),
    ],
)
def test_unusable_boxes_are_named(given: Any, message: str) -> None:
    with pytest.raises(PortraitError, match=message):
        prepare_portrait(gradient(100, 100), 64, face_box=given)


def test_exif_orientation_is_applied_before_anything_else(analyzer: FaceAnalyzer, tmp_path: Path) -> None:
    upright = picture((6, 14), height=640, width=480)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (640, 480)
        portrait = prepare_portrait(image, (128, 64), analyzer=analyzer)
    np.testing.assert_allclose(portrait.box, expected_box(6, 14), atol=1e-3)
    assert torch.equal(portrait.pixels, prepare_portrait(upright, (128, 64), analyzer=analyzer).pixels)


def test_modes_of_pictures_come_out_with_the_colour_they_show() -> None:
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[..., 0], clear[..., 3] = 255, 128  # red, half transparent, on white
    palette = Image.fromarray(np.full((8, 8, 3), (10, 200, 30), np.uint8)).quantize(4)
    keyed = Image.fromarray(np.zeros((8, 8), np.uint8), "L")
    keyed.info["transparency"] = 0
    expected: list[tuple[Any, tuple[int, int, int]]] = [
        (Image.fromarray(clear), (255, 127, 127)),
        (clear, (255, 127, 127)),
        (Image.fromarray(np.full((8, 8, 2), (100, 0), np.uint8), "LA"), (255, 255, 255)),
        (keyed, (255, 255, 255)),
        (palette, (10, 200, 30)),
        (Image.fromarray(np.full((8, 8), 77, np.uint8)), (77, 77, 77)),
        (np.full((8, 8), 77, np.uint8), (77, 77, 77)),
        (np.full((8, 8, 1), 77, np.uint8), (77, 77, 77)),
        (Image.fromarray(np.full((8, 8), 40000, np.uint16)), (156, 156, 156)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 0)), (255, 255, 255)),
        (torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 8, 8), (0, 128, 255)),
        (np.full((1, 1, 3), (1, 2, 3), np.uint8), (1, 2, 3)),
    ]
    for image, colour in expected:
        pixels = (prepare_portrait(image, 64, crop="none").pixels + 1) * 127.5
        assert pixels.shape == (3, 64, 64)
        np.testing.assert_allclose(pixels.mean((1, 2)), colour, atol=1.01, err_msg=str(image))


def test_a_float_tensor_of_the_right_size_passes_through_unchanged() -> None:
    image = torch.rand(3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = image.clone()
    portrait = prepare_portrait(image, (64, 128), crop="none")
    assert torch.equal(portrait.pixels, image) and torch.equal(image, before)
    portrait.pixels.zero_()
    assert torch.equal(image, before)  # a copy, not a view


def test_huge_pictures_are_handled() -> None:
    image = np.broadcast_to(np.array([10, 20, 30], np.uint8), (9000, 12000, 3))
    portrait = prepare_portrait(image, 64, face_box=(8000, 5000, 9000, 6000))
    assert portrait.crop == (7650, 4650, 9350, 6350)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        (500, "448x448 or 448x512 or 512x448 or 512x512"),
        ((512, 500), "nearest 512x448 or 512x512"),
        (0, "64x64"),
        ((-5, 64), "64x64"),
    ],
)
def test_other_sizes_are_refused_with_the_nearest(size: int | tuple[int, int], nearest: str) -> None:
    with pytest.raises(PortraitError, match=nearest):
        prepare_portrait(gradient(100, 100), size)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 8, 8), r"\[1, 8, 8\]; allowed is \[3, H, W\]"),
        (torch.full((3, 8, 8), 255.0), "from 255 to 255; allowed is"),
        (torch.full((3, 8, 8), float("nan")), "nan"),
        (torch.zeros(3, 0, 8), r"\[3, 0, 8\]"),
        (np.zeros((8, 8, 3), np.float32), r"float32 \[8, 8, 3\]"),
        (np.zeros((8, 8, 2), np.uint8), r"uint8 \[8, 8, 2\]"),
        (np.zeros((0, 8, 3), np.uint8), r"uint8 \[0, 8, 3\]"),
        ("portrait.png", "allowed are a PIL image"),
    ],
)
def test_unusable_pictures_are_named(image: Any, message: str) -> None:
    with pytest.raises(PortraitError, match=message):
        prepare_portrait(image, 64)


def test_a_truncated_file_is_a_portrait_error(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "a.jpg") as image, pytest.raises(PortraitError, match="cannot be read"):
        prepare_portrait(image, 64)


def test_unknown_choices_are_named() -> None:
    with pytest.raises(PortraitError, match="crop is 'centre'"):
        prepare_portrait(gradient(10, 10), 64, crop="centre")  # type: ignore[arg-type]
    with pytest.raises(PortraitError, match="margin is -1"):
        prepare_portrait(gradient(10, 10), 64, margin=-1)
