"""The settings of a squeeze as TOML: `[squeeze]` and `[model]`.

Keys and defaults of `[squeeze]` are those of the `squeeze` document; the keys after `device` are
additions. `[model] lora_rank` stands in for `source_rank` where that is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lora_squeeze.errors import RankError, SettingsError
from lora_squeeze.limits import Limits, check_limits
from lora_squeeze.policies import candidate_ranks, check_policy
from lora_squeeze.sections import build, choice, read_toml

__all__ = [
    "CHOICES",
    "ModelSettings",
    "Settings",
    "SqueezeSettings",
    "check_squeeze",
    "is_stray_max_lora_rank",
    "read_settings",
]

CHOICES = {
    "by": ("mean", "worst"),
    "method": ("gram", "qr", "randomized", "dense"),
    "runtime": ("", "peft", "vllm", "sglang", "llamacpp", "diffusers", "comfyui"),
    "dtype": ("", "f64", "f32", "f16", "bf16"),
}


@dataclass(frozen=True)
class SqueezeSettings:
    """The `[squeeze]` section."""

    adapter_path: str = ""  # a folder or file, or one on the Hub or at Tinker; required
    min_variance_retention: float = 0.95  # fraction of Σσ² to retain
    source_rank: int = 0  # expected rank; 0: [model].lora_rank, or else the tensors'
    target_ranks: list[int] = field(default_factory=list[int])  # candidates; []: powers of two
    output_path: str = ""  # where to write the squeezed adapter; "": analyze only
    compress_to: int = 0  # its rank; 0: the recommended one
    device: str = "cpu"  # torch device
    by: str = choice(CHOICES["by"], "mean")  # whether the mean or the "worst" layer must retain that much
    method: str = choice(CHOICES["method"], "gram")  # gram, qr, randomized or dense
    dtype: str = choice(CHOICES["dtype"], "")  # of the output: f64, f32, f16 or bf16; "": as it was
    policy: str = ""  # NAME=VALUE, how to choose ranks; "": compress_to, for all layers
    min_rank: int = -1  # of any layer; -1: 1, for global policies 0
    max_rank: int = 0  # of any layer; 0: no limit
    multiple_of: int = 1  # round ranks up to a multiple of this
    steps: list[int] = field(default_factory=list[int])  # round ranks up to one of these
    rank_for: dict[str, int] = field(default_factory=dict[str, int])  # pattern → rank; the first match decides
    equal: list[str] = field(default_factory=list[str])  # groups of layers with equal ranks: qkv, experts, a pattern
    runtime: str = choice(CHOICES["runtime"], "")  # what has to load it; "": its format's own tools
    max_lora_rank: int = 0  # what that server allows; 0: its default
    base_path: str = ""  # DoRA: folder or file of the base weights, to fit the magnitudes
    calibration: str = ""  # moments of lora-squeeze calibrate: variance is then measured on data
    overwrite: bool = False  # replace an existing output

    @property
    def limits(self) -> Limits:
        """min_rank … equal as the policies take them."""
        return Limits(
            min_rank=None if self.min_rank == -1 else self.min_rank,
            max_rank=self.max_rank or None,
            multiple_of=self.multiple_of,
            steps=tuple(self.steps),
            rank_for=tuple(self.rank_for.items()),
            equal=tuple(self.equal),
        )


@dataclass(frozen=True)
class ModelSettings:
    """The `[model]` section: what a LoRA is trained on. A squeeze heeds `lora_rank` alone."""

    model: str = ""  # folder, name on the Hub, or .gguf file
    revision: str = ""  # of the model on the Hub
    lora_rank: int = 0  # the rank to train at; 0: 64, or that of `adapter`. In a squeeze: the rank it was trained at
    adapter: str = ""  # folder of an adapter to start from; "": a fresh one
    squeeze_to: int = 0  # rank that `adapter` is squeezed to before it is trained on (Cont-Squeeze); 0: as it is
    dtype: str = choice(("auto", "f32", "f16", "bf16"), "auto")  # auto: f32 on a processor, else the model's own
    quantization: str = choice(("", "4bit", "8bit"), "")  # of the base's frozen weights, by bitsandbytes; "": none
    device: str = "auto"  # torch device; auto: the first GPU there is, else the processor


@dataclass(frozen=True)
class Settings:
    """A whole TOML file."""

    squeeze: SqueezeSettings
    model: ModelSettings = field(default_factory=ModelSettings)

    @property
    def source_rank(self) -> int:
        """The declared rank, 0 if none was."""
        return self.squeeze.source_rank or self.model.lora_rank


def read_settings(path: Path) -> Settings:
    """Read a TOML file. Raises SettingsError for anything unknown, mistyped or missing."""
    settings = build(Settings, read_toml(path), path)
    if not settings.squeeze.adapter_path:
        raise SettingsError(f"{path}: [squeeze] adapter_path is missing: which adapter shall be squeezed?")
    check_squeeze(settings.squeeze, path)
    return settings


def check_squeeze(chosen: SqueezeSettings, file: Path | str) -> None:
    """Refuse a `[squeeze]` that no adapter could be squeezed by, wherever it stands.

    Raises SettingsError, naming file and keys.
    """
    if chosen.policy and chosen.compress_to:
        raise SettingsError(f"{file}: [squeeze] policy and compress_to contradict each other: give one of them")
    if is_stray_max_lora_rank(chosen.max_lora_rank, chosen.runtime):
        raise SettingsError(
            f"{file}: [squeeze] max_lora_rank is what a server allows: say which with runtime, or use max_rank"
        )
    if not 0 < chosen.min_variance_retention <= 1:
        raise SettingsError(
            f"{file}: [squeeze] min_variance_retention = {chosen.min_variance_retention:g} is not possible: it is a "
            "fraction above 0 and up to 1, as 0.95"
        )
    for key in ("source_rank", "compress_to", "max_lora_rank"):
        if (value := getattr(chosen, key)) < 0:
            raise SettingsError(f"{file}: [squeeze] {key} must be at least 0, not {value}")
    try:
        candidate_ranks(max(chosen.target_ranks, default=1), chosen.target_ranks)
        check_limits(chosen.limits)
        if chosen.policy:
            check_policy(chosen.policy)
    except RankError as error:
        raise SettingsError(f"{file}: [squeeze] {error}") from error


def is_stray_max_lora_rank(max_lora_rank: int | None, runtime: str) -> bool:
    """Whether a max_lora_rank is given, but no server that it could be of."""
    return bool(max_lora_rank) and runtime in ("", "peft")
