"""An SGLang engine in this process: its start, its version, and requests with any field."""

from __future__ import annotations

from typing import Any


def sglang_version() -> str:
    """Version of the installed SGLang."""
    import sglang

    version: str = sglang.__version__
    return version


def start_engine(**arguments: Any) -> Any:
    """A running ``sglang.Engine``; the caller shuts it down."""
    import sglang

    return sglang.Engine(**arguments)


def generate(engine: Any, **fields: Any) -> Any:
    """Send one request, or several at once, with any field of SGLang's GenerateReqInput, and return the answer.

    ``Engine.generate`` takes fewer fields: no ``extra_key``.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    answers = engine.tokenizer_manager.generate_request(GenerateReqInput(**fields), None)
    return engine.loop.run_until_complete(answers.__anext__())
