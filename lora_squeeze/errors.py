"""Everything that can go wrong for a reason the user can mend.

LoraSqueezeError
├── AdapterError            a file of the adapter is missing, damaged or contradicts itself
│   ├── FetchError          it lies on the Hub or at Tinker and could not be fetched
│   └── UnsupportedAdapter  the adapter is sound, but cannot be squeezed as it is
├── RankError               ranks, thresholds or budgets that make no sense for this adapter
├── SettingsError           a TOML file or an option that is unknown, mistyped or contradictory
├── OutputError             the result cannot be written where it was asked for
├── DataError               training or evaluation data cannot be read or do not fit
├── ModelError              a base model or its tokenizer cannot be loaded, or does not fit the adapter
├── TrainingError           a training run cannot be started, continued or finished
└── MissingExtra            an optional dependency is not installed

Every message says what is wrong, in which file, layer or key, why, and what to do.
"""

__all__ = [
    "AdapterError",
    "DataError",
    "FetchError",
    "LoraSqueezeError",
    "MissingExtra",
    "ModelError",
    "OutputError",
    "RankError",
    "SettingsError",
    "TrainingError",
    "UnsupportedAdapter",
    "reason_of",
]


class LoraSqueezeError(Exception):
    """Base class of all errors that lora-squeeze raises on purpose."""


class AdapterError(LoraSqueezeError):
    """An adapter file is missing, damaged or contradicts itself."""


class FetchError(AdapterError):
    """An adapter lies on the Hub or at Tinker and could not be fetched."""


class UnsupportedAdapter(AdapterError):
    """The adapter is sound, but cannot be squeezed as it is."""


class RankError(LoraSqueezeError):
    """Ranks, thresholds or budgets that make no sense for this adapter."""


class SettingsError(LoraSqueezeError):
    """A TOML file or an option that is unknown, mistyped or contradictory."""


class OutputError(LoraSqueezeError):
    """The result cannot be written where it was asked for."""


class DataError(LoraSqueezeError):
    """Training or evaluation data cannot be read, or do not fit what they are wanted for."""


class ModelError(LoraSqueezeError):
    """A base model or its tokenizer cannot be loaded, or does not fit the adapter."""


class TrainingError(LoraSqueezeError):
    """A training run cannot be started, continued or finished."""


class MissingExtra(LoraSqueezeError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed; to use this: pip install 'lora-squeeze[{extra}]'")


def reason_of(error: Exception) -> str:
    """The first line of what a library says of its failure; the kind of failure if it says nothing.

    A heading, as torch's "Error(s) in loading state_dict for BertModel:", with the first line below it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
