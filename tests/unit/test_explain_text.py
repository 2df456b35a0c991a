"""Tokens as text, and the search for them in other prompts."""

from __future__ import annotations

import random

from transformers import AutoTokenizer

from a3_sglang.explain.text import Place, find, longest_prefix, pieces
from helpers.traffic import ODD


def test_pieces_are_the_text(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = random.Random(random.randrange(1 << 30))
    for text in (ODD, "", " leading", *("".join(rng.choices(ODD, k=60)) for _ in range(50))):
        ids = tokenizer.encode(text)
        found = pieces(tokenizer, ids)
        assert len(found) == len(ids)
        assert "".join(found) == text
    assert "" in pieces(tokenizer, tokenizer.encode("🧑‍🚀"))


def test_where_tokens_are_in_other_prompts() -> None:
    ids = [1, 2, 3, 4, 5, 6, 7]
    texts = [[9, 3, 4, 5], [3, 4, 5, 3, 4, 5, 6], [2, 3, 4, 5]]
    assert find(ids, 2, 5, 3, texts) == Place(1, 3)
    assert find(ids, 2, 5, 0, texts) == Place(1, 0)
    assert find(ids, 2, 5, 7, texts) in (Place(1, 3), Place(2, 1))
    assert find(ids, 2, 5, 1, [texts[0]]) == Place(0, 1)
    assert find(ids, 2, 6, 0, [texts[0]]) is None
    assert longest_prefix(ids, [[1, 2, 9], [1], [1, 2, 3]]) == (2, 3)
    assert longest_prefix(ids, [[4]]) == longest_prefix(ids, []) == (-1, 0)
