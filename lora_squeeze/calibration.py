"""Run data through a model with its adapter and gather what goes through the r-space of every layer.

A hook on each module's `lora_A` sees A x; with gradients, the gradient there is scale · B^T g, g being
the gradient of the loss at the module's output. Both are summed up as r×r second moments in float64,
without the positions that are padding. The loss is the sum over tokens, so nothing depends on how
examples are put into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_squeeze.annealing.live import Site, sites
from lora_squeeze.encoding import IGNORED
from lora_squeeze.errors import ModelError, UnsupportedAdapter
from lora_squeeze.evaluation.rows import Batch
from lora_squeeze.moments import LayerMoments, Moments, Seen

__all__ = ["calibrate"]


def calibrate(
    model: Any,
    batches: Iterable[Batch],
    *,
    seen: Seen,
    gradients: bool = False,
    adapter_sha256: str = "",
    base_model: str = "",
    adapter_name: str = "default",
) -> Moments:
    """The second moments of every layer's r-space on these batches.

    model
        a PeftModel with the adapter in it; in eval mode, so that dropout is off.
    gradients
        take those of the output side, too: a backward pass for every batch.
    seen, adapter_sha256, base_model
        kept in the result, so that what does not belong together is refused later.

    Raises UnsupportedAdapter, naming the module, where no activation of `lora_A` exists (experts stored
    as parameters, nn.MultiheadAttention), ModelError where padding cannot be told apart.
    """
    found = list(sites(model, adapter_name).values())
    _refuse_what_shows_nothing(found)
    gather = _Gatherer(found, gradients=gradients)
    tokens = 0
    with _watching(found, gather), _frozen_but(found, gradients), torch.set_grad_enabled(gradients):
        for batch in batches:
            mask = batch.inputs.get("attention_mask")
            gather.mask = None if mask is None or bool(mask.all()) else mask.bool()
            tokens += _positions(batch.inputs)
            output = model(**batch.inputs)
            if gradients:
                _total_loss(output.logits, batch.labels).backward()
                model.zero_grad(set_to_none=True)
    return Moments(
        layers=gather.moments(),
        tokens=tokens,
        adapter_sha256=adapter_sha256,
        base_model=base_model,
        seen=(seen,),
    )


def _positions(inputs: Mapping[str, Tensor]) -> int:
    """Tokens that are no padding; of inputs that are no text, the examples."""
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    return inputs["input_ids"].numel() if "input_ids" in inputs else len(next(iter(inputs.values())))


def _total_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p, summed over what is to be learnt."""
    if labels.ndim > 1:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def _refuse_what_shows_nothing(found: Iterable[Site]) -> None:
    for site in found:
        if site.kind == "expert" or site.parts[0].endswith(("#in_proj", "#out_proj")):
            what = "experts stored as one parameter" if site.kind == "expert" else "nn.MultiheadAttention"
            raise UnsupportedAdapter(
                f"layer '{site.name}': for {what}, PEFT adds the update to the weights, so nothing ever passes through "
                "lora_A alone and it cannot be calibrated; squeeze this adapter without --calibration"
            )
        if type(site.module.lora_variant.get(site.adapter)).__name__.startswith("ALora"):
            raise UnsupportedAdapter(
                f"layer '{site.name}': an activated LoRA works on some tokens only, which calibration cannot tell apart"
            )


class _Gatherer:
    """Sums of second moments by layer, and the mask of the batch that is being run."""

    def __init__(self, found: Iterable[Site], *, gradients: bool) -> None:
        self.mask: Tensor | None = None
        self.gradients = gradients
        self._rows: dict[str, int] = {}
        self._downs: dict[str, Tensor] = {}
        self._ups: dict[str, Tensor] = {}
        for site in found:
            for part in site.parts:
                self._rows[part] = 0
                self._downs[part] = self._zeros(site)
                if gradients:
                    self._ups[part] = self._zeros(site)

    @staticmethod
    def _zeros(site: Site) -> Tensor:
        device = site.down.device if site.down.device.type != "mps" else "cpu"  # which has no float64
        return torch.zeros(site.rank, site.rank, dtype=torch.float64, device=device)

    def add(self, site: Site, hidden: Tensor, *, factor: float = 1.0) -> None:
        """Count factor · A x, rows along all dimensions but the last."""
        rows = self._real(site, hidden.detach())
        for part, columns in zip(site.parts, rows.split(site.rank, dim=1), strict=True):
            self._downs[part] += _second_moment(columns, self._downs[part]) * factor**2
            self._rows[part] += len(columns)

    def add_gradient(self, site: Site, gradient: Tensor, *, factor: float) -> None:
        """Count factor · the gradient at A x."""
        rows = self._real(site, gradient)
        for part, columns in zip(site.parts, rows.split(site.rank, dim=1), strict=True):
            self._ups[part] += _second_moment(columns, self._ups[part]) * factor**2

    def moments(self) -> dict[str, LayerMoments]:
        return {
            name: LayerMoments(down.cpu(), self._ups[name].cpu() if self.gradients else None, self._rows[name])
            for name, down in self._downs.items()
        }

    def _real(self, site: Site, values: Tensor) -> Tensor:
        """The rows (n, r) that are not padding."""
        mask = self.mask
        rows = values.flatten(0, -2)
        if mask is None:
            return rows
        if values.shape[:-1] == mask.shape:
            return values[mask]
        if len(rows) == mask.numel():  # tokens that were flattened, in their order
            return rows[mask.flatten()]
        if values.ndim == 2 and len(values) == len(mask):  # one row an example: a head on what was pooled
            return rows
        raise ModelError(
            f"layer '{site.name}': its inputs have the shape {list(values.shape[:-1])} and the batch "
            f"{list(mask.shape)}, so padding cannot be told apart; run with --batch-size 1, which pads nothing"
        )


def _second_moment(rows: Tensor, like: Tensor) -> Tensor:
    wide = rows.to(like.device).double()
    return wide.T @ wide


@contextmanager
def _watching(found: Iterable[Site], gather: _Gatherer) -> Generator[None, None, None]:
    handles = [handle for site in found for handle in _hooks(site, gather)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(site: Site, gather: _Gatherer) -> list[Any]:
    if site.kind == "embedding":
        return [site.module.register_forward_hook(_embedding_hook(site, gather))]
    return [site.module.lora_A[site.adapter].register_forward_hook(_down_hook(site, gather))]


def _down_hook(site: Site, gather: _Gatherer) -> Callable[..., None]:
    last = site.kind != "conv"

    def rows(values: Tensor) -> Tensor:
        return values if last else values.movedim(1, -1)

    def took_gradient(gradient: Tensor) -> None:  # scale · B^T g
        gather.add_gradient(site, rows(gradient), factor=1 / site.scale)

    def watch(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if _is_identity(inputs[0]):
            return  # DoRA multiplies its factors this way
        gather.add(site, rows(output))
        if gather.gradients and output.requires_grad and site.scale:
            output.register_hook(took_gradient)

    return watch


def _embedding_hook(site: Site, gather: _Gatherer) -> Callable[..., None]:
    """An embedding's A x is a column of A, looked up by PEFT in a function that no hook sees."""

    def took_gradient(gradient: Tensor) -> None:
        gather.add_gradient(site, gradient @ site.up.detach(), factor=1.0)

    def watch(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        scale = module._get_embed_scale()  # Gemma multiplies its embeddings
        factor = 1.0 if scale is None else float(scale)
        gather.add(site, site.down.detach().T[inputs[0]], factor=factor)
        if gather.gradients and output.requires_grad:
            output.register_hook(took_gradient)

    return watch


def _is_identity(values: Tensor) -> bool:
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        return False
    return bool(torch.equal(values, torch.eye(len(values), dtype=values.dtype, device=values.device)))


@contextmanager
def _frozen_but(found: Iterable[Site], gradients: bool) -> Generator[None, None, None]:
    """Gradients flow where factors need them; afterwards all is as before."""
    factors = [factor for site in found for factor in (site.down, site.up)]
    before = [factor.requires_grad for factor in factors]
    for factor in factors:
        factor.requires_grad_(gradients)
    try:
        yield
    finally:
        for factor, needed in zip(factors, before, strict=True):
            factor.requires_grad_(needed)
