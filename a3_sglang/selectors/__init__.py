"""Selectors by name, one rule a file."""

from __future__ import annotations

from a3_sglang.selectors.a3 import A3
from a3_sglang.selectors.base import FreshLayer, Ratio, Rows, Selector
from a3_sglang.selectors.cacheblend import CacheBlend
from a3_sglang.selectors.epic import Epic
from a3_sglang.selectors.full import Full
from a3_sglang.selectors.probe import Probe
from a3_sglang.selectors.random_rows import Random
from a3_sglang.selectors.reuse import Reuse

_SELECTORS: dict[str, type[Selector]] = {cls.name: cls for cls in (Probe, A3, CacheBlend, Epic, Random, Reuse, Full)}


def selector_names() -> tuple[str, ...]:
    """Names that ``--a3-selector`` and ``custom_params.a3.selector`` accept."""
    return tuple(_SELECTORS)


def make_selector(name: str) -> Selector:
    """The selector of this name with its default options."""
    return _SELECTORS[name]()


__all__ = [
    "A3",
    "CacheBlend",
    "Epic",
    "FreshLayer",
    "Full",
    "Probe",
    "Random",
    "Ratio",
    "Reuse",
    "Rows",
    "Selector",
    "make_selector",
    "selector_names",
]
