"""Selectors by name, one rule per file."""

from __future__ import annotations

from importlib import import_module

from a3_sglang.selectors.base import DenseLayer, DenseLayers, ProbeLayers, ReusedRows, Selector
from a3_sglang.selectors.budget import Budget, Ratio, pick

_SELECTORS = {
    "probe": ("probe", "Probe"),
    "a3": ("a3", "A3"),
    "cacheblend": ("cacheblend", "CacheBlend"),
    "epic": ("epic", "Epic"),
    "prophetkv": ("prophetkv", "ProphetKV"),
    "qcfuse": ("qcfuse", "QCFuse"),
    "random": ("random_rows", "Random"),
    "reuse": ("reuse", "Reuse"),
    "full": ("full", "Full"),
}
"""Module of this package and class, by the name of the selector."""


def selector_names() -> tuple[str, ...]:
    """Names that ``--a3-selector`` and ``custom_params.a3.selector`` accept."""
    return tuple(_SELECTORS)


def make_selector(name: str) -> Selector:
    """The selector of this name with its default options.

    Raises:
        KeyError: there is none.
    """
    module, cls = _SELECTORS[name]
    selector: Selector = getattr(import_module(f"{__name__}.{module}"), cls)()
    return selector


__all__ = [
    "Budget",
    "DenseLayer",
    "DenseLayers",
    "ProbeLayers",
    "Ratio",
    "ReusedRows",
    "Selector",
    "make_selector",
    "pick",
    "selector_names",
]
