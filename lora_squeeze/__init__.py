"""Train a LoRA at a high rank, then squeeze it: rank analysis and compression of adapters.

    from lora_squeeze import analyze_adapter, compress_adapter

    analysis = analyze_adapter("my-adapter")
    compress_adapter("my-adapter", "my-adapter-small", analysis.recommended_rank)

or station by station:

    adapter = open_adapter("my-adapter")
    decomposition = decompose(adapter)
    ranks = variance(decomposition.spectra, 0.95)
    save_adapter(compress(decomposition, ranks), "my-adapter-small")

Names are imported when they are first used, so that importing the package (and asking the
command line for help) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_squeeze.version import __version__

if TYPE_CHECKING:
    from lora_squeeze.adapter import Adapter, LayerSpec, LoraLayer
    from lora_squeeze.analysis import analyze
    from lora_squeeze.annealing.callback import SqueezeCallback
    from lora_squeeze.annealing.schedule import Schedule
    from lora_squeeze.annealing.squeezer import Squeezer
    from lora_squeeze.compression import compress
    from lora_squeeze.decomposition import Decomposition, decompose
    from lora_squeeze.errors import LoraSqueezeError
    from lora_squeeze.formats import open_adapter, save_adapter
    from lora_squeeze.policies import fixed, variance
    from lora_squeeze.records import Analysis, Check, Compression, Ranks, Spectrum, Verification
    from lora_squeeze.upload import push
    from lora_squeeze.verbs import analyze_adapter, compress_adapter, squeeze
    from lora_squeeze.verification import verify

__all__ = [
    "Adapter",
    "Analysis",
    "Check",
    "Compression",
    "Decomposition",
    "LayerSpec",
    "LoraLayer",
    "LoraSqueezeError",
    "Ranks",
    "Schedule",
    "Spectrum",
    "SqueezeCallback",
    "Squeezer",
    "Verification",
    "__version__",
    "analyze",
    "analyze_adapter",
    "compress",
    "compress_adapter",
    "decompose",
    "fixed",
    "open_adapter",
    "push",
    "save_adapter",
    "squeeze",
    "variance",
    "verify",
]

_HOMES = {
    "adapter": ("Adapter", "LayerSpec", "LoraLayer"),
    "analysis": ("analyze",),
    "annealing.callback": ("SqueezeCallback",),
    "annealing.schedule": ("Schedule",),
    "annealing.squeezer": ("Squeezer",),
    "compression": ("compress",),
    "decomposition": ("Decomposition", "decompose"),
    "errors": ("LoraSqueezeError",),
    "formats": ("open_adapter", "save_adapter"),
    "policies": ("fixed", "variance"),
    "records": ("Analysis", "Check", "Compression", "Ranks", "Spectrum", "Verification"),
    "upload": ("push",),
    "verbs": ("analyze_adapter", "compress_adapter", "squeeze"),
    "verification": ("verify",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lora_squeeze' has no attribute '{name}'")
    value = getattr(import_module(f"lora_squeeze.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
