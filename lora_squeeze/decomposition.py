"""Pass 1: an adapter → the spectra of all its layers, and their changes of basis on a spool."""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import IO

import torch

from lora_squeeze.adapter import Adapter, LayerSpec, LoraLayer
from lora_squeeze.errors import AdapterError, OutputError
from lora_squeeze.formats.tensors import memory_of
from lora_squeeze.moments import Moments, check_moments
from lora_squeeze.parallel import ordered_map, runs
from lora_squeeze.records import Spectrum
from lora_squeeze.scratch import placed
from lora_squeeze.spectrum import Basis, bases, check_device, singular_values
from lora_squeeze.whitening import basis_on_data

__all__ = ["Decomposition", "borrow_together", "decompose", "naming", "spectrum_of", "together"]

# What layers that are worked on together may hold: 10 MiB in half precision.
_MOST_PARAMETERS = 5 << 20


@dataclass(frozen=True)
class Decomposition:
    """All spectra of an adapter, and where its changes of basis can be read again.

    Any number of rank plans can be applied to one decomposition. The bases (two r×q matrices a
    layer) lie in an unnamed temporary file, so memory does not grow with the adapter.
    method, device
        by which it was made, and on which everything that is made of it is computed.
    """

    adapter: Adapter
    spectra: tuple[Spectrum, ...]
    basis: Callable[[str], Basis] = field(repr=False)
    calibration: str = ""
    method: str = "gram"
    device: str = "cpu"


def decompose(
    adapter: Adapter,
    *,
    method: str = "gram",
    device: str = "cpu",
    seed: int = 0,
    moments: Moments | None = None,
    on_layer: Callable[[str], None] | None = None,
) -> Decomposition:
    """Decompose every layer, one at a time per worker.

    method
        "gram", "qr", "randomized" or "dense" (see `lora_squeeze.spectrum`).
    moments
        decompose in the metric of these data instead (see `lora_squeeze.whitening`): energies are
        then those of the layers' outputs, and `method` does not matter.
    on_layer
        called with each layer's name as it is finished, in file order.

    Raises AdapterError, naming layer and tensor, for NaN, infinity or an unreadable file.
    """
    check_device(device)
    if moments is not None:
        check_moments(moments, adapter)
        adapter = replace(adapter, notes=(*adapter.notes, *_notes(moments)))
    spool = _Spool()

    def work(names: Sequence[str]) -> list[tuple[Spectrum, Basis]]:
        with naming(adapter):
            return worked_out(names)

    def worked_out(names: Sequence[str]) -> list[tuple[Spectrum, Basis]]:
        layers = borrow_together(adapter, names)
        if moments is None:
            found = bases(layers, method=method, device=device, seed=seed)
        else:
            found = [
                basis_on_data(layer, *moments.means(name), device=device)
                for name, layer in zip(names, layers, strict=True)
            ]
        specs = [adapter.layers[name] for name in names]
        return [(spectrum_of(*one), one[-1]) for one in zip(specs, layers, found, strict=True)]

    spectra: list[Spectrum] = []
    parts = (names for run in runs([*adapter.layers.values()]) for names in together(run))
    for run in ordered_map(work, parts):
        for spectrum, found in run:
            spectra.append(spectrum)
            spool.append(spectrum.name, found)
            if on_layer is not None:
                on_layer(spectrum.name)
    return Decomposition(
        adapter=adapter,
        spectra=tuple(spectra),
        basis=lambda name: spool.read(name, device=device),
        calibration=(moments.identity or "moments in memory") if moments else "",
        method=method,
        device=device,
    )


def _notes(moments: Moments) -> Iterator[str]:
    sources = ", ".join(dict.fromkeys(one.source for one in moments.seen))
    what = "outputs, weighted by the loss's gradients" if moments.gradients else "outputs"
    yield (
        f"calibrated: variance and errors are those of the layers' {what} on {moments.tokens:,} tokens of "
        f"{moments.examples:,} examples ({sources})"
    )
    if unreached := [name for name, layer in moments.layers.items() if not layer.rows]:
        yield f"{len(unreached)} layers were never reached by the data and count as zero (first: {unreached[0]})"


def together(specs: Iterable[LayerSpec]) -> Iterator[list[str]]:
    """The names of consecutive layers that are worked on at once: as many as may be in memory together."""
    names: list[str] = []
    size = 0
    for spec in specs:
        if names and size + spec.parameters > _MOST_PARAMETERS:
            yield names
            names, size = [], 0
        names, size = [*names, spec.name], size + spec.parameters
    if names:
        yield names


def borrow_together(adapter: Adapter, names: Sequence[str]) -> list[LoraLayer]:
    """Borrow several layers; they last until this thread borrows again."""
    layers: list[LoraLayer] = []
    for place, name in enumerate(names):
        with placed(place):
            layers.append(adapter.borrow(name))
    return layers


@contextmanager
def naming(adapter: Adapter) -> Generator[None, None, None]:
    """What is wrong with a layer is said with the adapter that it is in."""
    try:
        yield
    except AdapterError as error:
        if str(error).startswith("layer '"):
            raise type(error)(f"{adapter.source}: {error}") from error
        raise


def spectrum_of(spec: LayerSpec, layer: LoraLayer, found: Basis) -> Spectrum:
    """The record of one decomposed layer. Raises AdapterError if no number can hold its energy."""
    spectrum = Spectrum(
        name=spec.name,
        out_features=spec.out_features,
        in_features=spec.in_features,
        rank=spec.rank,
        singular_values=singular_values(layer, found),
    )
    if not math.isfinite(spectrum.energy):
        raise AdapterError(
            f"layer '{spec.name}': with its scale of {spec.scale:g}, the update is too large for any number; "
            "is its alpha damaged?"
        )
    return spectrum


class _Spool:
    """Bases one after the other in an unnamed file, found again by layer name."""

    def __init__(self) -> None:
        with _or_output_error():
            self._file: IO[bytes] = tempfile.TemporaryFile(prefix="lora-squeeze-")  # noqa: SIM115
        self._places: dict[str, tuple[int, int, int, int]] = {}  # name → offset, r, q, numerical rank
        self._end = 0
        self._lock = threading.Lock()

    def append(self, name: str, found: Basis) -> None:
        r, q = found.p.shape
        parts = (found.p.reshape(-1), found.q.reshape(-1), found.singular_values, found.growth)
        numbers = torch.cat(parts).cpu()
        data = memory_of(numbers)
        with self._lock, _or_output_error():
            self._file.seek(self._end)
            self._file.write(data)
            self._file.flush()
            self._places[name] = (self._end, r, q, found.numerical_rank)
            self._end += len(data)

    def read(self, name: str, *, device: str) -> Basis:
        offset, r, q, numerical_rank = self._places[name]
        sizes = [r * q, r * q, q, q]
        with self._lock, _or_output_error():
            self._file.seek(offset)
            data = bytearray(self._file.read(8 * sum(sizes)))
        p, w, values, growth = torch.frombuffer(data, dtype=torch.float64).to(device).split(sizes)
        return Basis(
            singular_values=values,
            p=p.reshape(r, q),
            q=w.reshape(q, r),
            numerical_rank=numerical_rank,
            growth=growth,
        )


@contextmanager
def _or_output_error() -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        place = tempfile.tempdir or "no folder for temporary files"
        raise OutputError(f"{place}: {error.strerror}; set TMPDIR to a folder with room in it") from error
