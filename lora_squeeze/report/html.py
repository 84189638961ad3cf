"""One HTML file that needs nothing else: an exploration, the page, and the library that draws.

Names come from files that nobody vouches for. They reach the page only as JSON in an element that is
not executed, with "<", ">" and "&" escaped, and its scripts make text of them. The page's content
security policy allows the embedded scripts by their hash, and no connection at all.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import shlex
from array import array
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_squeeze.errors import RankError
from lora_squeeze.exploration import BUDGETS, RETENTIONS, Exploration
from lora_squeeze.measurements import Curve
from lora_squeeze.policies import parse_policy
from lora_squeeze.report.arrangement import arrange
from lora_squeeze.report.measured import campaign_section, quality_section
from lora_squeeze.sizes import bytes_text
from lora_squeeze.spelling import percent
from lora_squeeze.version import __version__

if TYPE_CHECKING:
    from lora_squeeze.campaign.overview import Overview

__all__ = ["report_page", "vendored"]

_SCRIPTS = (
    "record.js",
    "lookup.js",
    "text.js",
    "charts.js",
    "heatmap.js",
    "quality.js",
    "campaign.js",
    "controls.js",
    "start.js",
)


def report_page(exploration: Exploration, *, curve: Curve | None = None, campaign: Overview | None = None) -> str:
    """The page, complete: save it as report.html.

    curve
        quality that was measured with this adapter; campaign: the one that it is from.

    Raises RankError if the curve was measured with another adapter.
    """
    libraries = vendored()
    texts = [
        *(_text("vendor", name) for name in libraries),
        *(_text("page", name) for name in _SCRIPTS),
    ]
    policy = "; ".join(
        (
            "default-src 'none'",
            "script-src " + " ".join(f"'sha256-{_digest(text)}'" for text in texts),
            "style-src 'unsafe-inline'",  # the library's own; no name ever gets into a style
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    parts = {
        "policy": policy,
        "title": html.escape(campaign.folder.resolve().name if campaign else _title(exploration)),
        "generator": f"lora-squeeze {__version__}",
        "libraries": " and ".join(f"{one['package']} {one['version']}" for one in reversed(libraries.values())),
        "style": _text("page", "page.css"),
        "record": _json({**_record(exploration), **_measured(exploration, curve, campaign)}),
        "numbers": _numbers(exploration),
        "scripts": "\n".join(f"<script>{text}</script>" for text in texts),
    }
    template = _text("page", "page.html")
    pieces = template.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def _measured(exploration: Exploration, curve: Curve | None, campaign: Overview | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if campaign is not None:
        folder = campaign.folder.resolve()
        found |= {"campaign": campaign_section(campaign), "title": folder.name, "subtitle": str(campaign.folder)}
    if curve is not None:
        # An older curve has none, and neither has an analysis without its adapter.
        hashes = {curve.adapter_sha256, exploration.source_sha256} - {""}
        if len(hashes) > 1:
            raise RankError(
                f"the curve was measured with another adapter: the SHA-256 of that one's weights is "
                f"{curve.adapter_sha256[:12]}…, of {exploration.analysis.source} {exploration.source_sha256[:12]}…; "
                "measure it with this one: lora-squeeze curve"
            )
        parameters = exploration.settings[0].outcome.source_parameters
        measured = {point.outcome.source_parameters for point in curve.points} - {parameters}
        if measured:
            raise RankError(
                f"the curve was measured with another adapter: that has {min(measured):,} parameters, and "
                f"{exploration.analysis.source} has {parameters:,}"
            )
        found["quality"] = quality_section(curve)
    return found


def vendored() -> dict[str, dict[str, Any]]:
    """The libraries that stand in the page, in the order in which they are loaded: file → where it is from."""
    return json.loads(_text("vendor", "manifest.json"))


def _text(folder: str, name: str) -> str:
    return (files("lora_squeeze.report") / folder / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that no HTML parser can end early, and no line of which is a comment or an element to it."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _name: None)  # NaN has no spelling in JSON
    text = json.dumps(finite, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _record(exploration: Exploration) -> dict[str, Any]:
    analysis, curves, settings = exploration.analysis, exploration.curves, exploration.settings
    found = arrange([spectrum.name for spectrum in analysis.spectra])
    verdicts = list(dict.fromkeys(setting.verdicts for setting in settings))
    return {
        "title": _title(exploration),
        "subtitle": _subtitle(exploration),
        "facts": _facts(exploration),
        "notes": analysis.notes,
        "provenance": _provenance(exploration),
        "source_rank": analysis.source_rank,
        "recommended": {"rank": analysis.recommended_rank},
        "energy": sum(spectrum.energy for spectrum in analysis.spectra),
        "parameters": settings[0].outcome.source_parameters,
        "curves": {
            "mean": list(curves.mean_variance.values()),
            "worst": list(curves.min_variance.values()),
            "best": list(curves.max_variance.values()),
            "energy": list(curves.energy_variance.values()),
        },
        "columns": found.columns,
        "rows": found.rows,
        "column_title": found.what or "block",
        "in_order_label": f"layers, first to last ({found.what})" if found.what else "layers, first to last",
        "layers": [
            {
                "name": spectrum.name,
                "column": column,
                "row": row,
                "out": spectrum.out_features,
                "in": spectrum.in_features,
                "rank": spectrum.rank,
                "energy": spectrum.energy,
                "effective_rank": spectrum.effective_rank,
                "values": len(spectrum.singular_values),
            }
            for spectrum, (column, row) in zip(analysis.spectra, found.places, strict=True)
        ],
        "settings": [
            {
                "spelling": setting.spelling,
                "parameters": setting.outcome.parameters,
                "energy": setting.outcome.energy_kept,
                "worst": setting.outcome.worst_layer,
                "smallest": min(rank for rank in setting.ranks if rank > 0),
                "largest": setting.outcome.largest_rank,
                "left_out": setting.outcome.layers_left_out,
                "bytes": setting.outcome.file_bytes,
                "verdict": verdicts.index(setting.verdicts),
            }
            for setting in settings
        ],
        "first": next(place for place, setting in enumerate(settings) if setting.spelling == exploration.first),
        "verdicts": [[vars(verdict) for verdict in one] for one in verdicts],
        "runtimes": [verdict.runtime for verdict in verdicts[0]],
        "stops": _stops(exploration),
        "rank_bytes": 1 if analysis.source_rank < 256 else 2,
        "command": _command(exploration),
    }


def _numbers(exploration: Exploration) -> str:
    """float32 σ and V(1), V(2), … of all layers, then the ranks of each layer under all settings."""
    spectra = exploration.analysis.spectra
    values = array("f", (value for one in spectra for value in one.singular_values))
    kept = array("f", (one.retained_variance(k + 1) for one in spectra for k in range(len(one.singular_values))))
    code = "B" if exploration.analysis.source_rank < 256 else "H"
    ranks = array(
        code, (rank for layer in zip(*(one.ranks for one in exploration.settings), strict=True) for rank in layer)
    )
    packed = gzip.compress(b"".join(map(_little_endian, (values, kept, ranks))), mtime=0)
    return base64.b64encode(packed).decode()


def _little_endian(numbers: array[Any]) -> bytes:
    if array("H", [1]).tobytes() != b"\1\0":
        numbers.byteswap()
    return numbers.tobytes()


def _stops(exploration: Exploration) -> dict[str, Sequence[float]]:
    """Where the slider stops, for each limit: only where some setting is within it."""
    settings = exploration.settings
    parameters = settings[0].outcome.source_parameters
    least = min(setting.outcome.parameters for setting in settings)
    sizes = sorted({int(parse_policy(setting.spelling).value) for setting in settings if setting.policy == "size"})
    return {
        "parameters": [stop for share in BUDGETS if (stop := int(share * parameters)) >= least],
        "bytes": sizes,
        "energy": RETENTIONS,
        "worst": RETENTIONS,
    }


def _title(exploration: Exploration) -> str:
    return Path(exploration.analysis.source).name or exploration.analysis.source or "adapter"


def _subtitle(exploration: Exploration) -> str:
    summary = exploration.summary
    base = f", an adapter of {summary.base_model}" if summary and summary.base_model else ""
    return f"{exploration.analysis.source}{base}"


def _facts(exploration: Exploration) -> list[tuple[str, str]]:
    analysis, summary = exploration.analysis, exploration.summary
    facts = [
        ("Layers", str(len(analysis.spectra))),
        ("Rank", str(analysis.source_rank)),
        ("Recommended rank", str(analysis.recommended_rank)),
        ("Parameters", f"{exploration.settings[0].outcome.source_parameters:,}"),
    ]
    if summary is not None:
        facts += [
            ("Weights", bytes_text(summary.nbytes)),
            ("Format", summary.format),
        ]
    return facts


def _provenance(exploration: Exploration) -> list[tuple[str, str]]:
    analysis, summary = exploration.analysis, exploration.summary
    keep = percent(analysis.min_variance_retention)
    entries = [
        ("Source", analysis.source or "not named"),
        ("SHA-256 of the weights", exploration.source_sha256 or "not known: made from an analysis alone"),
        ("Recommended rank", f"{analysis.recommended_rank}: the {analysis.by} over layers retains {keep}"),
        ("Options of all settings", " ".join(exploration.options) or "none"),
        (
            "Settings looked at",
            f"{len(exploration.settings)}, all computed by lora-squeeze {__version__}; nothing is computed here",
        ),
    ]
    if summary is not None:
        entries += [
            ("Kinds of layers", _counts(summary.layers)),
            ("Ranks", _counts(summary.ranks)),
            ("Scales", _counts({f"{scale:g}": count for scale, count in summary.scales.items()})),
            ("Dtypes", _counts(summary.dtypes)),
            ("Kept as it is", f"{len(summary.passes_through)} tensors that are not LoRA pairs"),
        ]
    return entries


def _counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in counts.items())


def _command(exploration: Exploration) -> dict[str, str]:
    source = exploration.analysis.source or "ADAPTER"
    suffix = ".safetensors" if source.endswith(".safetensors") else ""
    output = f"{Path(source).name.removesuffix('.safetensors') or 'adapter'}-squeezed{suffix}"
    options = "".join(f" {shlex.quote(option)}" for option in exploration.options)
    start = "lora-squeeze compress -- " if source.startswith("-") else "lora-squeeze compress "
    return {"before": f"{start}{shlex.quote(source)} {shlex.quote(output)}", "after": options}
