"""Layer names → a table: which block a layer is in, and which of its module types it is.

`model.layers.3.self_attn.q_proj` is in column 3 and row `self_attn.q_proj`. Where names hold several
numbers (the blocks of a U-Net, experts), they are cut behind the one that makes the table fullest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Arrangement", "arrange"]

_NUMBER = re.compile(r"(?<![^._#])\d+(?=[._#])")


@dataclass(frozen=True)
class Arrangement:
    """Labels of columns and rows, and the (column, row) of each layer, in the order of the layers.

    what
        of what the columns are numbers: "layers"; "" if they are not simply numbered.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    places: tuple[tuple[int, int], ...]
    what: str


def arrange(names: Sequence[str]) -> Arrangement:
    """Arrange layers in a table. Names without a number get a column of their own, at its end."""
    most = max((len(_NUMBER.findall(name)) for name in names), default=0)
    cuts = [[_cut(name, numbers) for name in names] for numbers in range(1, most + 1)] or [[("", n) for n in names]]
    pairs = max(reversed(cuts), key=_fullness)
    blocks = sorted({block for block, _ in pairs}, key=lambda block: (not block, _natural(block)))
    rows = list(dict.fromkeys(row for _, row in sorted(pairs, key=lambda pair: not pair[0])))
    column_of, row_of = ({label: place for place, label in enumerate(labels)} for labels in (blocks, rows))
    numbered = {_NUMBER.sub("*", f"{block}.") for block in blocks if block}
    common = _common_start([block for block in blocks if block])
    return Arrangement(
        columns=tuple(block[len(common) :] if block else "other" for block in blocks),
        rows=tuple(rows),
        places=tuple((column_of[block], row_of[row]) for block, row in pairs),
        what=common.rstrip("._") if len(numbered) == 1 else "",
    )


def _cut(name: str, numbers: int) -> tuple[str, str]:
    """The name up to its n-th number (or its last, if it has fewer), and the rest."""
    found = list(_NUMBER.finditer(name))
    if not found:
        return "", name
    end = found[min(numbers, len(found)) - 1].end()
    return name[:end], name[end:].lstrip("._#")


def _fullness(pairs: Sequence[tuple[str, str]]) -> tuple[float, int]:
    columns, rows = len({block for block, _ in pairs}), len({row for _, row in pairs})
    return len(pairs) / (columns * rows), -rows


def _common_start(blocks: Sequence[str]) -> str:
    """What all of them begin with, up to a separator."""
    first, last = min(blocks, default=""), max(blocks, default="")
    same = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return re.sub(r"[^._]*$", "", first[:same])


def _natural(text: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text)]
