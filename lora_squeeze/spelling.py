"""Numbers as people write them: the shortest spelling that loses nothing that was meant, and lists read back."""

from __future__ import annotations

__all__ = ["percent", "read_numbers", "spell"]


def spell(value: float) -> str:
    """A number with as many digits as it has, up to twelve: what computing leaves behind these was never meant."""
    return f"{value:.12g}"


def percent(share: float) -> str:
    """A share as 98.5%."""
    return f"{spell(100 * share)}%"


def read_numbers(text: str) -> tuple[float, ...]:
    """'0.5,0.25' → (0.5, 0.25). Raises ValueError for anything that is no such list."""
    return tuple(float(number) for number in text.split(","))
