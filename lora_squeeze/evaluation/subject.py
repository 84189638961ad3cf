"""A base model with one or several adapters, loaded once; factors are swapped in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter
from lora_squeeze.annealing.live import Site, place, sites
from lora_squeeze.attaching import attach_adapter, attach_another, base_of, labels_of_adapter
from lora_squeeze.data import Example, Labelled, images_of, labels_of
from lora_squeeze.errors import AdapterError, DataError
from lora_squeeze.formats import open_adapter
from lora_squeeze.formats.remote import OnDownload
from lora_squeeze.identity import told_apart
from lora_squeeze.models import Task, device_of, load_model, load_seeing, load_tokenizer, pad_like
from lora_squeeze.seeing import tokenizer_of

__all__ = [
    "Contestant",
    "Subject",
    "activate",
    "contestant_of",
    "label_of",
    "loaded",
    "open_subject",
    "without_adapter",
]

_Placed = tuple[Site, Tensor, Tensor, float]


@dataclass(frozen=True)
class Contestant:
    """One adapter to be measured.

    adapter
        the name under which PEFT knows the one whose factors these are, or replace; "": none at all.
    factors
        what takes the place of its factors; empty: they stay as they were loaded.
    """

    label: str
    adapter: str
    rank: int
    parameters: int
    factors: tuple[_Placed, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Subject:
    """A model with adapters, what it is for, and how its inputs are made.

    reader
        makes inputs of examples: the tokenizer, or `lora_squeeze.seeing.Seeing` where there are images.
    adapters
        PEFT's name of each adapter → where it was loaded from, as `open_adapter` reads it.
    originals
        PEFT's name → every module's factors as they were loaded.
    orders
        PEFT's name → for each of `labels`, its place in the adapter's head; of those whose own order is another.
    """

    model: Any
    reader: Any
    task: Task
    labels: tuple[str, ...]
    base: str
    device: str
    adapters: Mapping[str, Adapter]
    originals: Mapping[str, tuple[_Placed, ...]] = field(repr=False)
    orders: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]], repr=False)

    @property
    def tokenizer(self) -> Any:
        """Of texts."""
        return tokenizer_of(self.reader)


def open_subject(
    adapters: Sequence[str],
    *,
    base: str = "",
    examples: Sequence[Example] = (),
    labels: Sequence[str] = (),
    dtype: str = "auto",
    quantization: str = "",
    device: str = "auto",
    on_download: OnDownload | None = None,
) -> Subject:
    """Load a base model and one or several adapters onto it.

    base
        default: the one that the first adapter names.
    examples
        that it is to be run on: images among them need a model that sees.
    labels
        what a classifier's classes are called, in the order of its head; default: as saved beside the adapter, or as
        in the examples. Where these very names are saved beside an adapter, the order there is its own; one beside
        which none are saved has the order given, or else the first's.
    dtype, quantization, device
        see `load_model`.
    on_download
        see `open_adapter`.

    Raises ModelError, AdapterError or DataError.
    """
    opened = [open_adapter(path, on_download=on_download) for path in adapters]
    for path, adapter in zip(adapters, opened, strict=True):
        if adapter.format != "peft":
            raise AdapterError(f"{path}: is a {adapter.format} file; only PEFT adapters can be loaded onto a model")
    adapters = [str(one.place) if one.origin else path for path, one in zip(adapters, opened, strict=True)]
    sees = any(map(images_of, examples))
    task: Task = "image-text-to-text" if sees else "causal-lm"
    if opened[0].config.get("task_type") == "SEQ_CLS":
        task = "sequence-classification"
    source = base or base_of(adapters[0])[0]
    known = _labels(adapters[0], opened[0], task, examples, labels)
    orders = _orders(adapters, known, labels) if task == "sequence-classification" else {}
    reader = load_seeing(source) if task == "image-text-to-text" else load_tokenizer(source)
    model = load_model(
        source,
        task=task,
        labels=known if task == "sequence-classification" else (),
        dtype=dtype,
        quantization=quantization,
        device=device,
    )
    names = _names(adapters)
    model = attach_adapter(model, adapters[0])
    for name, path in zip(names[1:], adapters[1:], strict=True):
        attach_another(model, path, name=name)
    if task == "sequence-classification":
        pad_like(model, tokenizer_of(reader))
    model.eval()
    model.config.use_cache = False  # nothing is generated
    return Subject(
        model=model,
        reader=reader,
        task=task,
        labels=known,
        base=source,
        device=device_of(device),
        adapters=dict(zip(names, opened, strict=True)),
        originals={name: _as_loaded(model, name) for name in names},
        orders=orders,
    )


def loaded(subject: Subject, name: str = "default") -> Contestant:
    """An adapter as it was loaded."""
    adapter = subject.adapters[name]
    return Contestant(label_of(subject, name), name, adapter.rank, adapter.parameters)


def label_of(subject: Subject, name: str) -> str:
    """What an adapter is called beside the others: the end of its path, as long as it takes to tell them apart."""
    sources = list(dict.fromkeys(one.source for one in subject.adapters.values()))
    source = subject.adapters[name].source
    return (told_apart(sources, "/".join) or sources)[sources.index(source)] or source


def without_adapter() -> Contestant:
    """The base model alone."""
    return Contestant("no adapter", "", 0, 0)


def contestant_of(subject: Subject, squeezed: Adapter, *, label: str, adapter: str = "default") -> Contestant:
    """An adapter with lower ranks than one that is loaded, to be swapped in for it.

    Layers that were left out get factors of zero. The numbers are those that `save_adapter` would write.
    """
    placed: list[_Placed] = []
    for site, down, up, scale in subject.originals[adapter]:
        if any(part in squeezed.layers for part in site.parts):
            layers = [squeezed.load(part) for part in site.parts]
            downs = torch.stack([layer.down for layer in layers]).to(down)
            ups = torch.stack([layer.up for layer in layers]).to(up)
            placed.append((site, site.as_down(downs).contiguous(), site.as_up(ups).contiguous(), layers[0].scale))
        else:
            zeros = torch.zeros_like(site.downs(down)[:, :1]), torch.zeros_like(site.ups(up)[:, :, :1])
            placed.append((site, site.as_down(zeros[0]), site.as_up(zeros[1]), scale))
    return Contestant(label, adapter, squeezed.rank, squeezed.parameters, tuple(placed))


def activate(subject: Subject, contestant: Contestant) -> None:
    """Make a contestant the model's adapter, in place."""
    if not contestant.adapter:
        subject.model.base_model.disable_adapter_layers()
        return
    subject.model.base_model.enable_adapter_layers()
    for site, down, up, scale in contestant.factors or subject.originals[contestant.adapter]:
        if site.down.data_ptr() != down.data_ptr() or site.up.data_ptr() != up.data_ptr() or site.scale != scale:
            place(site, down, up, scale=scale)
    if len(subject.adapters) > 1:
        subject.model.set_adapter(contestant.adapter)


def _as_loaded(model: Any, name: str) -> tuple[_Placed, ...]:
    return tuple((site, site.down.data, site.up.data, site.scale) for site in sites(model, name).values())


def _labels(
    path: str, adapter: Adapter, task: Task, examples: Sequence[Example], given: Sequence[str]
) -> tuple[str, ...]:
    if task == "sequence-classification":
        if given and (heads := _heads(adapter)) and len(given) not in heads:
            raise DataError(
                f"{path}: its head has {heads[-1]} classes, and --labels names {len(given)} ({', '.join(given)}); name "
                "every class, in their order"
            )
        if saved := _order_of(path, given):
            return saved
        found, classes = labels_of(examples), _classes(adapter)
        if len(found) != classes:
            raise DataError(
                f"{path}: its head has {classes or 'an unknown number of'} classes, and the data have {len(found)}; "
                "say what they are called, in their order, with --labels"
            )
        return found
    if given:
        return tuple(given)
    return labels_of(examples) if examples and isinstance(examples[0], Labelled) else ()


def _order_of(path: str, given: Sequence[str]) -> tuple[str, ...]:
    """A head's classes: those saved beside it, unless other names are given; () if there are neither."""
    saved = labels_of_adapter(path)
    return saved if not given or sorted(saved) == sorted(given) else tuple(given)


def _orders(paths: Sequence[str], known: tuple[str, ...], given: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Where each adapter's head has the first's classes: it was trained with an order of its own."""
    found: dict[str, tuple[int, ...]] = {}
    for name, path in zip(_names(paths), paths, strict=True):
        own = _order_of(path, given) or known
        if sorted(own) != sorted(known):
            raise DataError(
                f"{path}: its classes are {', '.join(own)}, and those of {paths[0]} {', '.join(known)}: answers can be "
                "compared only among the same classes; if the names alone differ, say them in their order with --labels"
            )
        if own != known:
            found[name] = tuple(map(own.index, known))
    return found


def _names(paths: Sequence[str]) -> list[str]:
    """What PEFT is to call these adapters."""
    return ["default", *(f"adapter{number}" for number in range(1, len(paths)))]


def _classes(adapter: Adapter) -> int:
    """Of the trained head: the rows of the last matrix that is no factor; 0 if there is none."""
    heads = _heads(adapter)
    return heads[-1] if heads else 0


def _heads(adapter: Adapter) -> list[int]:
    """The rows of every matrix that is no factor."""
    return [tensor.shape[0] for tensor in adapter.pass_through if len(tensor.shape) == 2]
