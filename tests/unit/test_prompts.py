"""Synthetic prompts of the benchmarks."""

from __future__ import annotations

import pytest
import typer

from a3_sglang.cli.common import check_chunks
from a3_sglang.client import Prompts


@pytest.mark.parametrize("chunks", [2, 3, 4, 8])
def test_no_order_is_the_donors_or_the_last(chunks: int):
    prompts = Prompts(1000, 512, chunks, seed=chunks)
    size = len(prompts.chunks[0])

    def order(ids: list[int]) -> list[list[int]]:
        text = ids[len(prompts.system) : len(prompts.system) + chunks * size]
        return [text[i : i + size] for i in range(0, len(text), size)]

    for _ in range(20):
        prompts.renew()
        donor = last = order(prompts.shuffled())
        for _ in range(5):
            now = order(prompts.shuffled())
            assert sorted(now) == sorted(prompts.chunks)
            assert now != donor
            # Two chunks have only one other order.
            assert now != last or chunks == 2
            last = now


def test_one_chunk_cannot_be_shuffled():
    with pytest.raises(ValueError, match="chunks must be at least 2"):
        Prompts(1000, 512, 1, seed=0)


def test_chunks_too_short_to_be_reused_are_refused():
    check_chunks(512, 8)
    with pytest.raises(typer.BadParameter, match="--context 512 or more"):
        check_chunks(511, 8)
