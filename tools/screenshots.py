"""Takes the pictures of the documentation, each with the command that users run.

Run with the Python of the environment::

    python tools/screenshots.py explain --model $(make -s model)
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

from PIL import Image

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMAND = Path(sys.executable).with_name("a3-sglang")
PASSAGE = 1500
"""Characters of a passage, at most."""
SYSTEM = "You answer questions about Python from the passages of its documentation."


def passages(*names: str) -> str:
    """A prompt over passages of CPython's documentation."""
    return "\n\n".join([SYSTEM, *(_passage(topics[name]) for name in names)])


def _passage(topic: str) -> str:
    """Its text without the line under its heading."""
    words = (word for word in topic.split() if set(word) != {"*"})
    return " ".join(words)[:PASSAGE]


def run(*arguments: str) -> None:
    print("$ a3-sglang", shlex.join(arguments), flush=True)
    subprocess.run([str(COMMAND), *arguments], check=True)


def shrink(picture: Path) -> None:
    """Reduce a PNG to 256 colours, which a page of text does not need more of."""
    with Image.open(picture) as full:
        full.convert("RGB").quantize(256).save(picture, optimize=True)


def explain(model: str, folder: Path) -> None:
    """docs/explain.png: passages of two earlier prompts in another order, with a new one between them."""
    texts = {
        "assert-del.txt": passages("assert", "del", "pass"),
        "global-break.txt": passages("global", "break", "continue"),
        "prompt.txt": passages("break", "assert", "import", "global"),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    donors = [argument for name in list(texts)[:2] for argument in ("--donor", str(folder / name))]
    question = "Question: What does the assert statement do when its expression is false?\nAnswer:"
    files = ["--output", str(folder / "page.html"), "--png", str(DOCS / "explain.png"), "--png-size", "1280x1552"]
    run("explain", str(folder / "prompt.txt"), *donors, "--question", question, "--model", model, *files)
    shrink(DOCS / "explain.png")


PICTURES: dict[str, Callable[[str, Path], None]] = {"explain": explain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", help=f"which: {', '.join(PICTURES)}; all by default")
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--keep", type=Path, help="folder that receives what the pictures were taken of")
    args = parser.parse_args()
    if unknown := set(args.pictures) - set(PICTURES):
        parser.error(f"no picture {sorted(unknown)[0]}; there are {', '.join(PICTURES)}")
    with tempfile.TemporaryDirectory(prefix="a3-pictures-") as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.pictures or PICTURES:
            PICTURES[name](args.model, folder)


if __name__ == "__main__":
    main()
