"""Takes the picture of the RAG app for its README, with a real server, the app and a browser.

python tools/pictures/rag_app.py --model MODEL -o docs/rag_app.png
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from a3_sglang.local_server import free_port, local_server

APP = Path(__file__).resolve().parents[2] / "examples" / "rag_app"
QUESTIONS = ("Who built the harbour?", "When does the ferry leave in winter?", "Who built the harbour?")
ARGUMENTS = ("--a3-report", "exact", "--max-total-tokens", "32768")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("-o", "--out", type=Path, required=True, help="PNG file")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of Chromium")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        local_server(args.model, Path(folder) / "log", *ARGUMENTS) as url,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1160, "height": 800}, color_scheme="light")
        rag_app(page, url, args.out)
        browser.close()


def rag_app(page: Page, server: str, out: Path) -> None:
    """Ask questions over the sample documents on a server with a3, and save the picture."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, str(APP / "app.py"), "--url", server, "--port", str(port)]
    app = subprocess.Popen(command, env=environment)
    try:
        wait(f"http://127.0.0.1:{port}/documents")
        page.goto(f"http://127.0.0.1:{port}")
        page.set_input_files("#files", sorted((APP / "samples").glob("*.md")))
        page.wait_for_selector("#documents li:nth-child(3)")
        for question in QUESTIONS:
            page.fill("#question", question)
            page.press("#question", "Enter")
            page.wait_for_selector("article:first-child .times .full:text('times as long')", timeout=120_000)
        save(page, out)
    finally:
        app.terminate()
        app.wait(timeout=30)


def wait(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    raise TimeoutError(url)


def save(page: Page, path: Path) -> None:
    """Save the whole page in 256 colours, which keeps the file small."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture.convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main()
