"""Small real ONNX models: detectors that see coloured spots as faces, recognisers that go by mean colour."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

# Landmarks around a face's middle in pixels of ArcFace's square, so that such a face is upright already.
MARKS = np.array([[-17.7, -20.3], [17.5, -20.5], [0.0, -0.3], [-14.5, 20.4], [14.7, 20.2]], np.float32)


def _save(
    path: Path, nodes: list, constants: dict[str, np.ndarray], entry: list, outlets: dict[str, list]
) -> None:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, entry)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outlets.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)


def _seen(channel: int, stride: int, outlet: str, *, repeat: int, constants: dict[str, np.ndarray]) -> list:
    """Nodes: how much more of a colour than of all three there is at each place of the stride's grid.

    So white and grey are no faces, of which there would be one at each of ten thousand places.
    """
    constants |= {"axis": np.array([1]), "flat": np.array([1, -1, 1])}
    constants |= {f"from{channel}": np.array([channel]), f"to{channel}": np.array([channel + 1])}
    return [
        helper.make_node("ReduceMean", ["input"], [f"m{stride}"], axes=[1]),
        helper.make_node("Slice", ["input", f"from{channel}", f"to{channel}", "axis"], [f"all{stride}"]),
        helper.make_node("Sub", [f"all{stride}", f"m{stride}"], [f"c{stride}"]),
        helper.make_node(
            "AveragePool", [f"c{stride}"], [f"p{stride}"], kernel_shape=[stride] * 2, strides=[stride] * 2
        ),
        helper.make_node("Reshape", [f"p{stride}", "flat"], [f"f{stride}"]),
        helper.make_node("Concat", [f"f{stride}"] * repeat, [f"r{stride}"], axis=2),
        helper.make_node("Reshape", [f"r{stride}", "flat"], [outlet]),
    ]


def scrfd(path: Path) -> None:
    """Red 8×8 spots are faces 40 pixels wide, green 16×16 spots are faces 128 wide."""
    constants: dict[str, np.ndarray] = {}
    nodes, outlets = [], {}
    for stride, channel, half in ((8, 0, 2.5), (16, 1, 4.0), (32, 2, 1.0)):
        places = 2 * (640 // stride) ** 2
        nodes += _seen(channel, stride, f"s{stride}", repeat=2, constants=constants)
        constants[f"b{stride}"] = np.full((places, 4), half, np.float32)
        marks = (MARKS * half * stride / 56 / stride).reshape(1, 10)
        constants[f"k{stride}"] = np.repeat(marks, places, axis=0).astype(np.float32)
    for kind, width in (("s", 1), ("b", 4), ("k", 10)):
        outlets |= {
            f"{kind}{s}": [1, 2 * (640 // s) ** 2, 1] if kind == "s" else [2 * (640 // s) ** 2, width]
            for s in (8, 16, 32)
        }
    # Blue is the third level; a face there would need a whole blue 32×32 spot.
    named = {f"o{name}": shape for name, shape in outlets.items()}
    nodes += [helper.make_node("Identity", [name], [f"o{name}"]) for name in outlets]
    _save(path, nodes, constants, [1, 3, 640, 640], named)


def yunet(path: Path) -> None:
    """Blue-green-red in, 0 to 255: red 8×8 spots are faces 40 pixels wide."""
    constants: dict[str, np.ndarray] = {"byte": np.array([1 / 255], np.float32)}
    nodes, outlets = [], {}
    for stride, channel in ((8, 2), (16, 1), (32, 0)):
        places = (640 // stride) ** 2
        nodes += _seen(channel, stride, f"raw{stride}", repeat=1, constants=constants)
        nodes.append(helper.make_node("Mul", [f"raw{stride}", "byte"], [f"cls_{stride}"]))
        level = np.float32(stride == 8)
        constants[f"o{stride}"] = np.full((1, places, 1), level, np.float32)
        box = np.array([0.5, 0.5, np.log(40 / stride), np.log(40 / stride)], np.float32)
        constants[f"b{stride}"] = np.tile(box, (1, places, 1))
        constants[f"k{stride}"] = np.tile((MARKS * 40 / 112 / stride + 0.5).reshape(10), (1, places, 1))
        for mark, name, width in (("o", "obj", 1), ("b", "bbox", 4), ("k", "kps", 10)):
            nodes.append(helper.make_node("Identity", [f"{mark}{stride}"], [f"{name}_{stride}"]))
            outlets[f"{name}_{stride}"] = [1, places, width]
        outlets[f"cls_{stride}"] = [1, places, 1]
    constants = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in constants.items()}
    _save(path, nodes, constants, [1, 3, 640, 640], outlets)


def recogniser(path: Path, width: int = 512) -> np.ndarray:
    """An embedding linear in the mean colour; returns its (3, width) matrix."""
    matrix = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32) * 10
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["mean"]),
        helper.make_node("Reshape", ["mean", "rows"], ["colour"]),
        helper.make_node("MatMul", ["colour", "matrix"], ["embedding"]),
    ]
    constants = {"rows": np.array([-1, 3]), "matrix": matrix}
    _save(path, nodes, constants, ["N", 3, 112, 112], {"embedding": ["N", width]})
    return matrix


def pack(folder: Path) -> Path:
    """A folder with a detector and a recogniser under InsightFace's names."""
    folder.mkdir(parents=True, exist_ok=True)
    scrfd(folder / "det_10g.onnx")
    recogniser(folder / "w600k_r50.onnx")
    return folder


def photo(*spots: tuple[int, int, str], size: tuple[int, int] = (640, 640), colour: int = 60) -> Image.Image:
    """A plain picture with a red or green spot of the detector's size at each (x, y), multiples of 16."""
    image = Image.new("RGB", size, (colour, colour, colour + 40))
    for x, y, what in spots:
        side = 8 if what == "red" else 16
        image.paste((255, 0, 90) if what == "red" else (0, 255, 90), (x, y, x + side, y + side))
    return image
