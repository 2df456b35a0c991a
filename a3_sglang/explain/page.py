"""An explanation as one self-contained HTML page, and a picture of it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from a3_sglang.explain.client import ExplainError
from a3_sglang.explain.collect import Explanation

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
_SECONDS = 120


def render(explanation: Explanation) -> str:
    """The page. Markup in the texts is shown as text."""
    parts = {name: _read(f"page.{name}") for name in ("css", "js")}
    parts["title"] = html.escape(explanation.name)
    # Only "<" could end a script element.
    parts["data"] = json.dumps(asdict(explanation)).replace("<", "\\u003c")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def _read(name: str) -> str:
    return (files("a3_sglang.explain") / name).read_text(encoding="utf-8")


def screenshot(page: Path, picture: Path, size: tuple[int, int]) -> None:
    """Draw a page with the headless Chromium on the PATH.

    Args:
        page: an HTML file.
        picture: PNG file to write.
        size: width and height of the window in pixels.

    Raises:
        ExplainError: there is no Chromium, or it drew nothing.
    """
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise ExplainError(f"--png: no browser on the path; install Chromium (looked for {', '.join(_BROWSERS)})")
    picture.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="a3-explain-") as profile:
        command = [browser, *_FLAGS, f"--user-data-dir={profile}", "--hide-scrollbars"]
        command += [f"--window-size={size[0]},{size[1]}", f"--screenshot={picture.resolve()}", page.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
            output = done.stderr.strip()
        except subprocess.TimeoutExpired:
            output = f"no picture after {_SECONDS} seconds"
    if not picture.exists():
        raise ExplainError(f"--png: {browser} drew nothing: {output[-200:]}")
