"""The command ``a3-sglang``."""

from __future__ import annotations

import sys

from a3_sglang.cli.output import VERBOSE, silence


def main() -> None:
    """Console script."""
    if VERBOSE not in sys.argv:
        silence()
    # Imported here, because SGLang emits warnings while it is imported.
    from a3_sglang.cli.app import app

    app()
