"""Takes the picture of the page of `a3-sglang explain`, for docs/operating.md.

    python tools/pictures/explain.py --model MODEL -o docs/explain.png

Passages of two earlier prompts are asked about in another order, with a new one between them.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from PIL import Image

COMMAND = Path(sys.executable).with_name("a3-sglang")
PASSAGE = 1500
"""Most characters of a passage."""
QUESTION = "Question: What does the assert statement do when its expression is false?\nAnswer:"
SYSTEM = "You answer questions about Python from the passages of its documentation."


def passages(*names: str) -> str:
    """A prompt over passages of CPython's documentation."""
    return "\n\n".join([SYSTEM, *(_passage(topics[name]) for name in names)])


def _passage(topic: str) -> str:
    """The topic's text without the line under its heading."""
    words = (word for word in topic.split() if set(word) != {"*"})
    return " ".join(words)[:PASSAGE]


def run(*arguments: str) -> None:
    print("$ a3-sglang", shlex.join(arguments), flush=True)
    subprocess.run([str(COMMAND), *arguments], check=True)


def shrink(picture: Path) -> None:
    """Reduce a PNG to 256 colours, which are enough for a page of text."""
    with Image.open(picture) as full:
        full.convert("RGB").quantize(256).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("-o", "--out", type=Path, required=True, help="PNG file")
    args = parser.parse_args()
    texts = {
        "assert-del.txt": passages("assert", "del", "pass"),
        "global-break.txt": passages("global", "break", "continue"),
        "prompt.txt": passages("break", "assert", "import", "global"),
    }
    with tempfile.TemporaryDirectory(prefix="a3-pictures-") as name:
        folder = Path(name)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        donors = [argument for file in list(texts)[:2] for argument in ("--donor", str(folder / file))]
        files = ["--output", str(folder / "page.html"), "--png", str(args.out), "--png-size", "1280x1552"]
        run("explain", str(folder / "prompt.txt"), *donors, "--question", QUESTION, "--model", args.model, *files)
    shrink(args.out)


if __name__ == "__main__":
    main()
