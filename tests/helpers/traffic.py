"""Prompts and requests of the engine tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from a3_sglang.client import generate
from a3_sglang.reporting.report import PARTS

WORDS = (
    "river",
    "stone",
    "lamp",
    "garden",
    "winter",
    "letter",
    "music",
    "bridge",
    "silver",
    "harbor",
    "window",
    "candle",
    "forest",
    "market",
)
"""For texts without meaning."""
ODD = (
    "naïve 🧑‍🚀 漢字 Ω≈ç √ \u00a0 e\u0301 \ufffd \t\r\n"
    "<|im_end|> {{data}} </script><script>document.title = 'hacked'</script>"
)
"""A text that is hard to show token by token, and to embed in a page."""


class Traffic:
    """Prompts over a fixed set of documents, and requests to one engine.

    Spans begin and end at blocks of 16 of the donor's tokens, so up to 30 tokens of a document may be in no span.
    """

    def __init__(self, running: Any, seed: int, folder: Path | None = None) -> None:
        self.running, self.random, self.folder = running, random.Random(seed), folder
        self.system = self.tokens(24)
        self.renew()

    def renew(self) -> None:
        self.documents = [self.tokens(self.random.randrange(90, 160)) for _ in range(8)]

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(5, 49000) for _ in range(count)]

    def prompt(self, documents: list[int] | None = None, question: int = 40) -> list[int]:
        chosen = documents or self.random.sample(range(8), 4)
        return self.system + [t for i in chosen for t in self.documents[i]] + self.tokens(question)

    def ask(self, ids: list[int], a3: Any = None, tokens: int = 6, **more: Any) -> dict[str, Any]:
        return generate(self.running, ids, tokens, a3, return_logprob=True, **more)

    def kv(self, out: dict[str, Any]) -> dict[str, torch.Tensor]:
        assert self.folder is not None
        return torch.load(self.folder / f"{out['meta_info']['id']}.pt")


def parts(report: dict[str, Any]) -> int:
    """Tokens of the prompt, summed over the parts of its report."""
    return sum(report[name] for name in PARTS)


def answer(out: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Tokens and logprobs."""
    return list(out["output_ids"]), [pair[0] for pair in out["meta_info"]["output_token_logprobs"]]
