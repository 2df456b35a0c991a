"""Imports point down, and SGLang is imported in one place."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHAPE = runpy.run_path(str(ROOT / "tools" / "shape.py"))


def test_only_integration_imports_sglang_and_imports_point_down() -> None:
    outside, upward = SHAPE["wrong_imports"](ROOT)
    assert not outside
    assert not upward


def test_a_wrong_import_is_found(tmp_path: Path) -> None:
    for name, text in {"matching/a": "from a3_sglang.cli import app", "fusion/b": "import sglang.srt"}.items():
        path = tmp_path / "a3_sglang" / f"{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert SHAPE["wrong_imports"](tmp_path) == (
        ["a3_sglang/fusion/b.py"],
        ["a3_sglang/matching/a.py -> a3_sglang.cli"],
    )


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {path.relative_to(ROOT).parts[1].removesuffix(".py") for path in (ROOT / "a3_sglang").rglob("*.py")}
    assert parts - {"__init__"} <= {name for layer in SHAPE["LAYERS"] for name in layer}
