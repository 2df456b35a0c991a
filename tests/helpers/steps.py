"""The steps of docs/extending.md, as a reader would follow them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def steps(section: str) -> list[str]:
    """The numbered steps of a section."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return re.split(r"^\d+\. ", text, flags=re.MULTILINE)[1:]


def code(step: str) -> str:
    """The one block of Python in a step."""
    (block,) = python_blocks(step)
    return textwrap.dedent(block)


def path(step: str) -> str:
    """The first file that a step names."""
    return re.findall(r"`([a-z0-9_/]+\.py)`", step)[0]


def python_blocks(text: str) -> list[str]:
    """Blocks of Python, indented as they are in the text."""
    return re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
