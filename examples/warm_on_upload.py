"""What an app calls when documents are uploaded, so that their KV is computed before the first question.

    python examples/warm_on_upload.py report.md notes.txt --url http://127.0.0.1:30000

The app's process needs neither SGLang nor PyTorch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from a3_sglang.warm import Document, warm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--system", help="system message of the later prompts")
    args = parser.parse_args()
    documents = (Document(path.read_text(encoding="utf-8"), path.name) for path in args.files)
    for one in warm(args.url, documents, system=args.system):
        print(f"{one.document.name}: {one.error or f'{one.tokens} tokens, of them {one.cached} known before'}")


if __name__ == "__main__":
    main()
