# pyright: strict
"""The public names as a user's type checker sees them: `make types` checks this file, nothing runs it."""

from pathlib import Path

from typing_extensions import assert_type

from lora_squeeze import (
    Adapter,
    Analysis,
    Check,
    Compression,
    Decomposition,
    LayerSpec,
    LoraLayer,
    LoraSqueezeError,
    Ranks,
    Schedule,
    Spectrum,
    SqueezeCallback,
    Squeezer,
    Verification,
    __version__,
    analyze,
    analyze_adapter,
    compress,
    compress_adapter,
    decompose,
    fixed,
    open_adapter,
    push,
    save_adapter,
    squeeze,
    variance,
    verify,
)


def whole_jobs(path: Path) -> None:
    """Paths may be texts or Path."""
    analysis = analyze_adapter(path, target_ranks=[4, 8], by="worst")
    assert_type(analysis, Analysis)
    assert_type(analysis.mean_variance, dict[int, float])
    assert_type(analysis.spectra, tuple[Spectrum, ...])
    assert_type(Analysis.from_json(analysis.to_json()), Analysis)
    compression = compress_adapter("in", path, analysis.recommended_rank, dtype="BF16", overwrite=True)
    assert_type(compression, Compression)
    assert_type(compression.relative_error, float)
    assert_type(compression.worst_layer.spectrum.name, str)
    assert_type(push(compression, "user/repo@branch", private=True, commit_message="text"), str)
    verification = verify(path, "in", on_layer=print)
    assert_type(verification, Verification)
    assert_type(verification.checks, tuple[Check, ...])
    assert_type(verification.loss, Compression | None)


def stations() -> None:
    """The same, step by step."""
    adapter = open_adapter("in")
    assert_type(adapter, Adapter)
    assert_type([*adapter.layers.values()], list[LayerSpec])
    assert_type(adapter.load("layer"), LoraLayer)
    assert_type(adapter.load("layer").down.shape[0], int)
    decomposition = decompose(adapter, method="qr")
    assert_type(decomposition, Decomposition)
    assert_type(analyze(decomposition.spectra), Analysis)
    ranks = variance(decomposition.spectra, 0.9)
    assert_type(ranks, Ranks)
    assert_type(ranks.by_layer, dict[str, int])
    assert_type(fixed(adapter.layers.values(), 8), Ranks)
    assert_type(compress(decomposition, ranks), Adapter)
    assert_type(save_adapter(compress(adapter, ranks), "out").nbytes, int)
    assert_type(squeeze(adapter, ranks, Path("out")), Compression)


def training(squeezer: Squeezer, schedule: Schedule, callback: type[SqueezeCallback]) -> None:
    """What takes part in a training."""
    print(squeezer, schedule, callback)


def mistakes() -> str:
    """Errors have one base."""
    try:
        open_adapter("nowhere")
    except LoraSqueezeError as error:
        return str(error)
    return __version__
