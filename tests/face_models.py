"""Small ONNX models of the released face models' signature."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memo_core.encoders.face import FaceAnalyzer

SIDES = (1.0, 1.5, 2.0, 2.5)  # how far the test detector's boxes reach: left, up, right, down, in strides
KEYPOINTS = ((0.25, 0.5), (0.75, 0.5), (0.5, 0.75), (0.25, 1.0), (0.75, 1.0))  # in strides, from the cell's corner


def save_detector(path: Path, strides: tuple[int, ...]) -> None:
    """SCRFD's input and nine outputs; fires on pure red cells, the redder the surer, at the given strides only."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, outputs = [], [], []

    def head(name: str, stride: int, kernel: np.ndarray, bias: np.ndarray, width: int) -> None:
        weights.append(numpy_helper.from_array(kernel.astype(np.float32).reshape(-1, 3, 1, 1), f"{name}_kernel"))
        weights.append(numpy_helper.from_array(bias.astype(np.float32), f"{name}_bias"))
        weights.append(numpy_helper.from_array(np.array([-1, width]), f"{name}_shape"))
        nodes.append(helper.make_node("Conv", [f"cells{stride}", f"{name}_kernel", f"{name}_bias"], [f"{name}_map"]))
        nodes.append(helper.make_node("Transpose", [f"{name}_map"], [f"{name}_last"], perm=[2, 3, 0, 1]))
        flat = f"{name}_flat" if width == 1 else name
        nodes.append(helper.make_node("Reshape", [f"{name}_last", f"{name}_shape"], [flat]))
        if width == 1:
            nodes.append(helper.make_node("Sigmoid", [flat], [name]))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width]))

    for stride in (8, 16, 32):
        pool = {"kernel_shape": [stride, stride], "strides": [stride, stride]}
        nodes.append(helper.make_node("AveragePool", ["input.1"], [f"cells{stride}"], **pool))
    for stride in (8, 16, 32):  # (x - 127.5) / 128 makes pure red 2.99 and black 1 here; the second anchor is less sure
        red = 10 * np.array([[1, -1, -1], [1, -1, -1]])
        head(f"score{stride}", stride, red, np.array([-25, -26]) if stride in strides else np.full(2, -99), 1)
    for stride in (8, 16, 32):
        head(f"box{stride}", stride, np.zeros((8, 3)), np.array(SIDES * 2), 4)
    for stride in (8, 16, 32):
        head(f"points{stride}", stride, np.zeros((20, 3)), np.array(KEYPOINTS * 2).ravel(), 10)
    picture = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, "height", "width"])
    graph = helper.make_graph(nodes, "detector", [picture], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


def save_embedder(path: Path) -> None:
    """ArcFace's input and output; the first 512 of the [3, 14, 14] means over 8x8 pixels."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("AveragePool", ["input.1"], ["means"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("Slice", ["flat", "start", "end", "axis"], ["embedding"]),
    ]
    numbers = {"start": 0, "end": 512, "axis": 1}
    graph = helper.make_graph(
        nodes,
        "embedder",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 512])],
        [numpy_helper.from_array(np.array([value]), name) for name, value in numbers.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


def make_analyzer(folder: Path, strides: tuple[int, ...]) -> FaceAnalyzer:
    models = folder / "misc" / "face_analysis" / "models"
    models.mkdir(parents=True, exist_ok=True)
    save_detector(models / "scrfd_10g_bnkps.onnx", strides)
    save_embedder(models / "glintr100.onnx")
    analyzer = FaceAnalyzer.from_folder(folder)
    assert analyzer is not None
    return analyzer
