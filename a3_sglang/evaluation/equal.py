"""Speed at equal quality: the ratios at which the default rule is as close to the full prefill as published rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PEERS = ("a3", "cacheblend", "epic", "prophetkv", "qcfuse")
"""The published rules."""
DEFAULT = "probe"
RATIO = 0.15
"""The nominal ratio of the published rules."""
GRID = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1)
"""Ratios at which the default rule is measured first, besides :data:`RATIO`."""
ROUNDS = 3
DIGITS = 4


def crossing(kl: float, curve: Mapping[float, float]) -> float | None:
    """The least ratio at which a measured curve comes down to a KL.

    Between two measured ratios it is interpolated, both axes logarithmic, and rounded up.

    Args:
        kl: mean KL divergence.
        curve: mean KL by ratio.

    Returns:
        None if it never does; the least measured ratio if it is below ``kl`` from there on.
    """
    ratios = sorted(curve)
    at = next((i for i, ratio in enumerate(ratios) if curve[ratio] <= kl), None)
    if not at:
        return None if at is None else ratios[0]
    before, after = ratios[at - 1], ratios[at]
    least = 1e-12  # A KL of zero has no logarithm.
    share = math.log(curve[before] / max(kl, least)) / math.log(curve[before] / max(curve[after], least))
    ratio = before * (after / before) ** share
    return min(math.ceil(round(ratio * 10**DIGITS, 6)) / 10**DIGITS, after)


def ratios_for(
    targets: Mapping[str, float], curve: dict[float, float], measure: Callable[[list[float]], Mapping[float, float]]
) -> dict[str, float | None]:
    """For each KL a ratio at which the default rule was measured to be at most as far from the full prefill.

    The curve is interpolated, then measured there. If the measured KL is above the target, the curve with this point
    is interpolated again, at most :data:`ROUNDS` times; then the next measured ratio that is good enough is taken.

    Args:
        targets: mean KL, by name.
        curve: mean KL of the default rule by ratio; what is measured is added to it.
        measure: measures the mean KL at some ratios.

    Returns:
        By name; None if no ratio of the curve is good enough.
    """
    found: dict[str, float | None] = {}
    for _ in range(ROUNDS):
        tries = {name: crossing(kl, curve) for name, kl in targets.items() if name not in found}
        if missing := sorted({ratio for ratio in tries.values() if ratio is not None} - curve.keys()):
            curve.update(measure(missing))
        found |= {name: at for name, at in tries.items() if at is None or curve[at] <= targets[name]}
    return {name: found.get(name, _reached(kl, curve)) for name, kl in targets.items()}


def _reached(kl: float, curve: Mapping[float, float]) -> float | None:
    return next((ratio for ratio in sorted(curve) if curve[ratio] <= kl), None)


def draw(
    rows: Sequence[Mapping[str, Any]], default: Mapping[str, Any], stock_ms: float, title: str, path: Path
) -> None:
    """Draw KL against time to first token: published rules, the default rule at their ratio and KLs, and stock.

    Args:
        rows: of the published rules, with ``rule``, ``ratio``, ``kl`` and ``ms``, and the same of the default in
            ``default``, or None.
        default: the same of the default rule at the published rules' ratio.
        stock_ms: of the full prefill.
        title: of the picture.
        path: of the SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # With a salt, the names of the SVG's elements are reproducible.
    with rc_context({"svg.hashsalt": "a3"}):
        picture = Figure(figsize=(8.5, 4.2))
        axes = picture.subplots()
        for i, row in enumerate(rows):
            axes.plot(row["ms"], row["kl"], "o", color=f"C{i + 1}", label=f"{row['rule']}, {row['ratio']:.0%}")
            if row["default"]:
                axes.plot([row["default"]["ms"], row["ms"]], [row["kl"]] * 2, ":", color=f"C{i + 1}", linewidth=1)
        mine = {row["ratio"]: row for row in (default, *(row["default"] for row in rows)) if row}
        curve = [mine[ratio] for ratio in sorted(mine)]
        axes.plot([row["ms"] for row in curve], [row["kl"] for row in curve], "D-", color="C0", label=DEFAULT)
        for row in curve:
            at, offset = (row["ms"], row["kl"]), (-8, -13)
            axes.annotate(f"{row['ratio']:.1%}", at, offset, textcoords="offset points", fontsize=8)
        axes.margins(y=0.12)
        axes.axvline(stock_ms, color="gray", linewidth=1, label="full prefill of stock SGLang")
        axes.set(xlim=(0, None), yscale="log", title=title)
        axes.set_xlabel("time to first token, ms")
        axes.set_ylabel("mean KL to the full prefill")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        picture.tight_layout()
        picture.savefig(path, format="svg", metadata={"Date": None})
