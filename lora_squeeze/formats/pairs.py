"""What kohya and diffusers files have in common: one file, pairs of factors, an alpha tensor beside some."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch

from lora_squeeze.adapter import Adapter, LayerSpec, LoraLayer, PassThrough
from lora_squeeze.errors import AdapterError, UnsupportedAdapter
from lora_squeeze.formats.dora import dora_note, magnitude_module
from lora_squeeze.formats.tensors import DTYPES, SafetensorsFile, TensorSpec
from lora_squeeze.formats.writing import Block

__all__ = [
    "Factors",
    "adapter_of",
    "blocks_of",
    "find_alphas",
    "pick_alpha_dtype",
    "read_alpha",
    "read_pair",
    "refuse_other_methods",
]

# Module → the keys of its tensors: "down", "up", and if there are such "mid" and "alpha".
Factors = dict[str, dict[str, str]]

_ALPHA_DTYPES = {**DTYPES, "I64": torch.int64, "I32": torch.int32}

# Of a convolution in CP form, which grows by this factor when it is folded; 16 × 16 is larger than any in use.
_LARGEST_KERNEL = 1024

# A piece of a tensor's key → the method it belongs to. Their updates are no product of two factors.
_OTHER_METHODS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_blocks": "OFT",
    ".oft_diag": "OFT",
    ".boft_": "BOFT",
    ".on_input": "(IA)³",
    ".vera_lambda": "VeRA",
}


def refuse_other_methods(file: SafetensorsFile) -> None:
    """Raise UnsupportedAdapter if the tensors are those of another method than LoRA."""
    for key in file.tensors:
        for piece, method in _OTHER_METHODS.items():
            if piece in key:
                raise UnsupportedAdapter(
                    f"{file.path}: '{key}' belongs to {method}, which is not LoRA; merge it into the base model and "
                    "extract a LoRA from the difference (LyCORIS: tools/merge.py, then tools/extract_locon.py), then "
                    "squeeze that"
                )


def read_alpha(file: SafetensorsFile, key: str) -> float:
    """The number in an alpha tensor. Raises AdapterError if it is none."""
    spec = file.tensors[key]
    if spec.dtype not in _ALPHA_DTYPES or math.prod(spec.shape) != 1:
        raise AdapterError(
            f"{file.path}: '{key}' has dtype {spec.dtype} and shape {list(spec.shape)}; one number is expected"
        )
    data = bytearray(b"".join(file.chunks(key)))
    value = float(torch.frombuffer(data, dtype=_ALPHA_DTYPES[spec.dtype]).item())
    if not math.isfinite(value):
        raise AdapterError(f"{file.path}: '{key}' is {value}; the file is damaged")
    return value


def read_pair(file: SafetensorsFile, name: str, down_key: str, up_key: str, *, middle_key: str = "") -> LayerSpec:
    """What is known of a layer from the shapes of its tensors; the scale is 1.

    middle_key
        of a convolution in CP form (down 1×1, middle r×r×kernel, up 1×1).

    Raises AdapterError, naming file and key, if they do not fit together.
    """
    down, up = file.tensors[down_key], file.tensors[up_key]
    middle = file.tensors[middle_key] if middle_key else None
    for spec in (down, up, *([middle] if middle else [])):
        if spec.dtype not in DTYPES:
            raise AdapterError(
                f"{file.path}: '{spec.key}' has dtype {spec.dtype}; LoRA factors of {', '.join(DTYPES)} can be "
                "squeezed: convert the adapter first"
            )
        if len(spec.shape) < 2 or 0 in spec.shape:
            raise AdapterError(f"{file.path}: '{spec.key}' has shape {list(spec.shape)}; a matrix was expected")
    rank, kernel = up.shape[1], down.shape[2:]
    fits = len(up.shape) == len(down.shape) and math.prod(up.shape[2:]) == 1
    if middle is not None:
        fits = fits and middle.shape[:2] == (rank, down.shape[0]) and math.prod(kernel) == 1
        fits = fits and len(middle.shape) == len(down.shape) > 2
        kernel = middle.shape[2:]
    if not fits or (middle is None and down.shape[0] != rank):
        shapes = f"{list(down.shape)} of '{down_key}' and {list(up.shape)} of '{up_key}'"
        through = f" through {list(middle.shape)} of '{middle_key}'" if middle else ""
        raise AdapterError(f"{file.path}: the shapes {shapes} do not fit together{through}")
    if middle is not None and math.prod(kernel) > _LARGEST_KERNEL:
        raise AdapterError(
            f"{file.path}: '{middle_key}' has a kernel of {math.prod(kernel)} numbers; folded into '{down_key}', "
            "they would take far more memory than the file"
        )
    return LayerSpec(
        name=name,
        out_features=up.shape[0],
        in_features=down.shape[1] * math.prod(kernel),
        rank=rank,
        scale=1.0,
        down_dtype=down.dtype,
        up_dtype=up.dtype,
        kind="conv" if len(down.shape) > 2 else "linear",
        kernel=kernel,
        keys=(down_key, up_key),
        folded=middle is not None,
    )


def find_alphas(file: SafetensorsFile, modules: Factors) -> list[str]:
    """Add the keys of alpha tensors; return those that belong to no module. Raises AdapterError if there is none."""
    if not modules:
        raise AdapterError(f"{file.path}: holds no pair of LoRA factors (lora_down / lora_up); is this a LoRA?")
    for name, keys in modules.items():
        if f"{name}.alpha" in file.tensors:
            keys["alpha"] = f"{name}.alpha"
    used = {key for keys in modules.values() for key in keys.values()}
    return [key for key in file.tensors if key not in used]


def adapter_of(
    file: SafetensorsFile,
    modules: Factors,
    layers: Mapping[str, LayerSpec],
    *,
    form: str,
    others: list[str],
    config: Mapping[str, Any],
    notes: Iterable[str] = (),
) -> Adapter:
    """The adapter in a file of pairs.

    form
        the format's name.
    others
        keys that belong to no module: they are carried over.
    """

    def read(name: str, down_as: str = "", up_as: str = "") -> LoraLayer:
        spec, keys = layers[name], modules[name]
        down = file.read(keys["down"], borrow_as=down_as)
        if spec.folded:
            down = _folded(file.read(keys["mid"]), down)
        return LoraLayer(
            name=name,
            down=down.reshape(spec.rank, spec.in_features),
            up=file.read(keys["up"], borrow_as=up_as).reshape(spec.out_features, spec.rank),
            scale=spec.scale,
        )

    kept = tuple(_pass_through(file, key, layer=_layer_of(key, layers)) for key in others)
    return Adapter(
        source=str(file.path),
        format=form,
        layers=layers,
        load=read,
        borrow=partial(read, down_as="down", up_as="up"),
        pass_through=kept,
        config=config,
        metadata=file.metadata,
        weights=file.path,
        sha256=cache(file.sha256),
        hash_along=file.hash_along,
        notes=(*notes, *dora_note(others), *_kept_note([one for one in kept if not magnitude_module(one.key)])),
        single_file=True,
    )


def _folded(middle: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """(i, j, …) and (j, c, 1…) → Σ_j middle[i, j, …] · down[j, c]: (i, c, …), in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(middle.dtype, down.dtype), torch.float32)
    return torch.einsum("ij...,jc->ic...", middle.to(wide), down.flatten(1).to(wide))


def _layer_of(key: str, layers: Mapping[str, LayerSpec]) -> str:
    """The layer whose name the key begins with, if there is one."""
    return next((key[:end] for end, letter in enumerate(key) if letter == "." and key[:end] in layers), "")


def _pass_through(file: SafetensorsFile, key: str, *, layer: str) -> PassThrough:
    spec = file.tensors[key]
    return PassThrough(key, spec.dtype, spec.shape, spec.nbytes, lambda: file.chunks(key), layer=layer)


def _kept_note(tensors: Sequence[PassThrough]) -> Iterator[str]:
    """Says how many tensors are carried over because they are no LoRA pairs, if there are any."""
    if tensors:
        first = f"'{tensors[0].key}'" + (", …" if len(tensors) > 1 else "")
        yield f"{len(tensors)} tensors that are no factors of a LoRA pair are kept as they are: {first}"


def blocks_of(
    adapter: Adapter, keys: Callable[[LayerSpec], tuple[str, ...]], *, alphas: Mapping[str, str]
) -> list[Block]:
    """What a file of pairs is made of.

    keys
        layer → the keys of its two factors.
    alphas
        layer name → dtype of its alpha tensor, for those that get one.
    """
    blocks: list[Block] = []
    for spec in adapter.layers.values():
        blocks.append(_pair_block(spec, keys(spec), adapter.borrow))
        if spec.name in alphas:
            blocks.append(_alpha_block(spec, alphas[spec.name]))
    return blocks + [_kept_block(tensor) for tensor in adapter.pass_through]


def pick_alpha_dtype(spec: LayerSpec) -> str:
    """The dtype that the layer's alpha tensor has had, if it can hold the new value; otherwise F32."""
    dtype, alpha = spec.alpha_dtype, spec.scale * spec.rank
    if dtype in _ALPHA_DTYPES and math.isclose(
        float(torch.tensor(alpha, dtype=torch.float64).to(_ALPHA_DTYPES[dtype])), alpha, rel_tol=1e-7
    ):
        return dtype
    return "F32"


def _pair_block(spec: LayerSpec, keys: tuple[str, ...], borrow: Callable[[str], LoraLayer]) -> Block:
    channels = spec.in_features // math.prod(spec.kernel)
    shapes = [(spec.rank, channels, *spec.kernel), (spec.out_features, spec.rank, *(1 for _ in spec.kernel))]
    specs = tuple(
        TensorSpec(key, dtype, shape, math.prod(shape) * DTYPES[dtype].itemsize)
        for key, dtype, shape in zip(keys, (spec.down_dtype, spec.up_dtype), shapes, strict=True)
    )

    def make() -> list[torch.Tensor]:
        layer = borrow(spec.name)
        return [
            factor.to(DTYPES[tensor.dtype]).reshape(tensor.shape)
            for factor, tensor in zip((layer.down, layer.up), specs, strict=True)
        ]

    return Block(specs, make, (spec.name,))


def _alpha_block(spec: LayerSpec, dtype: str) -> Block:
    value = torch.tensor(spec.scale * spec.rank, dtype=torch.float64).to(_ALPHA_DTYPES[dtype])
    return Block((TensorSpec(f"{spec.name}.alpha", dtype, (), value.element_size()),), lambda: [value])


def _kept_block(tensor: PassThrough) -> Block:
    return Block((TensorSpec(tensor.key, tensor.dtype, tensor.shape, tensor.nbytes),), lambda: [tensor.chunks()])
