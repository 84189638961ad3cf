"""What LoRA-Squeeze claims, and what is found here: a verdict for each, by rules that are older than the numbers."""

from __future__ import annotations

from reproductions.small.claims import Claim, verdict
from reproductions.small.findings import Mean, differences
from reproductions.small.wording import count, points
from reproductions.vision import findings
from reproductions.vision.experiments import DIRECT, best_rate
from reproductions.vision.measuring import Done
from reproductions.vision.training import CONT, SOURCE


def claims(done: Done) -> list[Claim]:
    """Those that have been measured."""
    found = [_seen(done), _same_rate(done), _own_rate(done), _extreme(done)]
    found += [_annealed(done, kind) for kind in ("in-squeeze", "cont-squeeze")]
    return [one for one in (*found, _halving(done)) if one]


def _seen(done: Done) -> Claim | None:
    """None of the papers': without it, the rest would say nothing of images."""
    found = findings.brought(done, SOURCE)
    return found and (
        "(The answers come from the images)",
        f"{points(found)} points over the same adapters with a grey image",
        verdict([found]),
    )


def _same_rate(done: Done) -> Claim | None:
    high = best_rate(done, SOURCE)
    claim = "Tuned at the highest rank alone, Post-Squeeze beats direct training at every lower rank (Figure 3)"
    return _against_direct(done, claim, dict.fromkeys(DIRECT, high))


def _own_rate(done: Done) -> Claim | None:
    claim = "With every rank at its own rate, Post-Squeeze gains a few tenths of a point (Figure 4)"
    return _against_direct(done, claim, {rank: best_rate(done, rank) for rank in DIRECT})


def _against_direct(done: Done, claim: str, rates: dict[int, float | None]) -> Claim | None:
    changes = {
        rank: differences(findings.post(done, rank), findings.direct(done, rank, rate)) for rank, rate in rates.items()
    }
    found = {rank: one for rank, one in changes.items() if one}
    if not found:
        return None
    each = ", ".join(f"{points(one)} at rank {rank}" for rank, one in found.items())
    return claim, f"{each}: {count(found.values())}", verdict(found.values())


def _extreme(done: Done) -> Claim | None:
    lost = differences(findings.post(done, 1), findings.post(done, SOURCE))
    claim = "An extreme gap collapses: 128 → 1 loses 12.8 points at 4B, 29.6 at 1B"
    return lost and (claim, f"{SOURCE} → 1: {points(lost)} points against rank {SOURCE}", verdict([lost], better=-1))


def _annealed(done: Done, kind: str) -> Claim | None:
    """Against direct training at its own rate where that is known, and against Post-Squeeze."""
    own = best_rate(done, CONT)
    high = best_rate(done, SOURCE)
    mine = findings.annealed(done, kind)
    versus: list[tuple[str, Mean | None]] = [
        ("direct training at its own rate", differences(mine, findings.direct(done, CONT, own))),
        ("direct training at rank 64's rate", differences(mine, findings.direct(done, CONT, high))),
        ("Post-Squeeze", differences(mine, findings.post(done, CONT))),
    ]
    said = [(name, one) for name, one in versus if one]
    if not said:
        return None
    claim = f"{kind.title()} beats direct training and Post-Squeeze at rank {CONT}"
    text = ", ".join(f"{points(one)} against {name}" for name, one in said)
    return claim, text, verdict([one for _, one in said])


def _halving(done: Done) -> Claim | None:
    found = findings.retained(done, 32)
    return found and (
        "Halving the rank keeps about 96 % of the variance (of rank 128) or 94 % (of 32) on every task",
        f"{SOURCE} → 32 keeps {min(found.values):.1%} to {max(found.values):.1%}",
        "confirmed" if min(found.values) >= 0.94 else "not confirmed",
    )
