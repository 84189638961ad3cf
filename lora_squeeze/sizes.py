"""Sizes in bytes as people write them: read and shown, in powers of 1000 (KiB, MiB and GiB are read as well)."""

from __future__ import annotations

import math
import re

__all__ = ["bytes_text", "read_size"]

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_size(text: str) -> int:
    """'20MB' → 20,000,000. Raises ValueError for anything that is no size."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([KMG]i?B|B)?", text, re.IGNORECASE)
    if match is None:
        raise ValueError(text)
    return math.floor(float(match[1]) * _BYTES[(match[2] or "").upper()])


def bytes_text(count: float) -> str:
    """A size as people write it, in powers of 1000: 19.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
