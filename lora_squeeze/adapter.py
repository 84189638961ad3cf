"""What every format is read into: named LoRA layers that are loaded one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Adapter", "Deviation", "LayerSpec", "LoraLayer", "PassThrough", "whole"]

# In what a file may differ from what is written in its place, so that a program may stumble over the file itself:
# AdaLoRA's factors; keys without PEFT's prefix, or with an adapter's name in them; a configuration without its
# peft_type, or one that asks for an initialisation that its ranks do not allow; pickled tensors; convolutions of
# three factors.
Deviation: TypeAlias = Literal[
    "adalora", "bare keys", "named keys", "no peft_type", "odd orthogonal", "pickled", "cp form"
]


def _nothing(*_: object) -> None:
    """What most adapters do about hints."""


def whole(name: str) -> str:
    """The module or parameter that a layer is a part of.

    Where one stored module holds several matrices, each of them is a layer named MODULE#PART: expert 3
    of a three-dimensional parameter is `layers.0.mlp.experts.down_proj#3`. As the format has one rank
    for the module, all its parts get the same, and none can be left out.
    """
    return name.partition("#")[0]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What is known of a LoRA layer without reading its tensors.

    scale
        the effective scale: ΔW = scale · up · down.
    down_dtype, up_dtype
        of the stored factors, in safetensors' spelling ("BF16", "F32", …).
    name
        as the format's rules see it; parts of one module are named MODULE#PART (see `whole`).
    kind
        "linear", "conv", "embedding" or "expert": how the format stores the two matrices.
    kernel
        the trailing dimensions of a convolution's kernel; they count into `in_features`.
    keys
        what the file calls `down` and `up`, in formats that have more than one spelling.
    alpha_dtype
        of the alpha tensor beside the factors, in formats that have one; "" if there is none.
    folded
        the factors are computed when they are read, so they are new even at their own rank.
    stored_as
        the module's name in the file, where that is another than the layer's.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    scale: float
    down_dtype: str
    up_dtype: str
    kind: str = "linear"
    kernel: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    alpha_dtype: str = ""
    folded: bool = False
    stored_as: str = ""

    @property
    def parameters(self) -> int:
        """Numbers in the two factors: rank · (out_features + in_features)."""
        return self.rank * (self.out_features + self.in_features)


@dataclass(frozen=True)
class LoraLayer:
    """The two factors of one layer as matrices; ΔW = scale · up @ down."""

    name: str
    down: Tensor  # (rank, in_features), PEFT's lora_A
    up: Tensor  # (out_features, rank), PEFT's lora_B
    scale: float


@dataclass(frozen=True)
class PassThrough:
    """A tensor that is not part of a LoRA pair: its bytes are carried over as they are.

    layer
        the layer it belongs to, if it means nothing without that layer's factors.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[bytes]] = field(repr=False, compare=False)
    layer: str = ""


@dataclass(frozen=True)
class Adapter:
    """An adapter whose numbers are known and whose tensors are loaded on demand.

    layers
        in file order; `load(name)` reads (or computes) the factors of one of them. `borrow(name)`
        may do so in memory that this thread's next `borrow` uses again.
    expect
        a hint: this thread will borrow these layers next, in this order. Adapters that compute their
        layers may then work on several of them at once.
    pass_through
        tensors that are not LoRA pairs (modules_to_save, biases, DoRA magnitudes, …).
    config, metadata
        the format's own configuration and file metadata, kept field by field.
    files
        other files of the adapter's folder (tokenizer, chat template, …): relative path → file.
    late_metadata
        what is only known once all tensors have been written; it is called with their fingerprint
        (see `formats.tensors`) and replaces entries of `metadata`.
    weights, sha256
        the file that holds the source's tensors, if there is one, and (asked for) its SHA-256.
    hash_along
        a hint: `sha256` will be asked for when all layers have been loaded, so it may be taken of
        what is read for them.
    left_out
        modules that a policy gave rank 0: they are adapted no more.
    deviations
        what was put right when it was read (or will be when it is written) → how the file has it. Layers
        and configuration are as if the file had been in order; who judges the file itself looks here.
    notes
        what the user should know about this adapter.
    single_file
        the source is one file, not a folder.
    origin
        where it was fetched from, with its revision; "" if it lay on this disk.
    """

    source: str
    format: str
    layers: Mapping[str, LayerSpec]
    load: Callable[[str], LoraLayer] = field(repr=False)
    borrow: Callable[[str], LoraLayer] = field(repr=False)
    expect: Callable[[Sequence[str]], None] = field(default=_nothing, repr=False)
    pass_through: tuple[PassThrough, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    files: Mapping[str, Path] = field(default_factory=dict[str, Path])
    late_metadata: Callable[[str], Mapping[str, str]] | None = field(default=None, repr=False)
    weights: Path | None = None
    sha256: Callable[[], str] = field(default=str, repr=False)
    hash_along: Callable[[], None] = field(default=_nothing, repr=False)
    left_out: tuple[str, ...] = ()
    deviations: Mapping[Deviation, str] = field(default_factory=dict[Deviation, str])
    notes: tuple[str, ...] = ()
    single_file: bool = False
    origin: str = ""

    @property
    def place(self) -> Path | None:
        """The source's folder (or its file, if that is all there is) on disk, if it is there."""
        return self.weights if self.single_file or self.weights is None else self.weights.parent

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max(spec.rank for spec in self.layers.values())

    @property
    def parameters(self) -> int:
        """Parameters of the LoRA pairs."""
        return sum(spec.parameters for spec in self.layers.values())
