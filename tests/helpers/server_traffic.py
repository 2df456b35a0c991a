"""Prompts and requests of the tests of a server."""

from __future__ import annotations

import random
import urllib.request
from typing import Any

import openai
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from helpers.serving import Served
from helpers.traffic import WORDS

RETRACTING: dict[str, Any] = {
    # SGLang's own switch: while decoding, every now and then some requests lose their slots and wait again.
    "variables": {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "12"},
    "arguments": ["--enable-metrics", "--log-requests"],
    "dump": True,
}
"""Settings of the server, see :meth:`helpers.serving.Servers.get`."""


class ServerTraffic:
    """Prompts over six documents of random words, and requests to one server."""

    def __init__(self, served: Served, model: str) -> None:
        self.served, self.url, self.log = served, served.url, served.log
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.random = random.Random(random.randrange(1 << 30))
        self.openai = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        self.documents = [" ".join(self.random.choices(WORDS, k=80)) + "." for _ in range(6)]

    def send_donors(self) -> None:
        """Leave the six documents in the cache, and nothing else."""
        self.served.flush()
        for half in ([0, 1, 2], [3, 4, 5]):
            status, out = self.generate(self.text(half), False)
            assert status == 200
            assert out["meta_info"]["a3"]["reason"] == "off"

    def text(self, order: list[int] | None = None) -> str:
        chosen = order or self.random.sample(range(6), 4)
        number = self.random.randrange(1 << 20)
        return "\n\n".join(self.documents[i] for i in chosen) + f"\n\nQuestion {number}: which word stands first?"

    def generate(self, text: str, a3: Any, tokens: int = 4) -> tuple[int, Any]:
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "custom_params": {"a3": a3}}
        return self.served.request("/generate", {"text": text, "sampling_params": params})

    def kv(self, out: dict[str, Any]) -> dict[str, torch.Tensor]:
        """KV in the request's slots after its last extend, (layers, tokens, kv_heads, head_dim) each."""
        return torch.load(self.served.folder / f"{out['meta_info']['id']}.pt")

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """All samples of SGLang's metrics, by name and labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}
