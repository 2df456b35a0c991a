"""The file in which commands keep single results."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import typer

from a3_sglang.cli.experiment import Cells
from a3_sglang.evaluation.runner import Result

SETTINGS = {"seed": 1, "dtype": "float32"}
RESULT = Result(3, "probe", 0.15, "harvest", 0.01, 1.0, None, None, 0.16)


def test_results_are_found_again_by_key(tmp_path: Path):
    path, other = tmp_path / "cells.jsonl", replace(RESULT, question=4)
    cells = Cells(path, SETTINGS, Result)
    cells.keep(RESULT)
    cells.keep(other)
    again = Cells(path, SETTINGS, Result)
    assert again == cells == {RESULT.key: RESULT, other.key: other}


def test_a_line_that_was_interrupted_is_dropped(tmp_path: Path):
    path, other = tmp_path / "cells.jsonl", replace(RESULT, question=4)
    Cells(path, SETTINGS, Result).keep(RESULT)
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    cells = Cells(path, SETTINGS, Result)
    cells.keep(other)
    assert [asdict(result) for result in Cells(path, SETTINGS, Result).values()] == [asdict(RESULT), asdict(other)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"settings": {"seed": 2}}', "other settings"),
        ('{"settings": {"seed": 1, "dtype": "float32"}, "runs": 7}', ":2 is not a result of this command"),
        ("[1]", ":2 is not a result of this command"),
        ("{", ":2 is not a result of this command"),
    ],
)
def test_other_files_are_refused_and_kept(tmp_path: Path, line: str, message: str):
    path = tmp_path / "cells.jsonl"
    Cells(path, SETTINGS, Result).keep(RESULT)
    before = path.read_text() + line + "\n"
    path.write_text(before)
    with pytest.raises(typer.BadParameter, match=message):
        Cells(path, SETTINGS, Result)
    assert path.read_text() == before
