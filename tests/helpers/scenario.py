"""A small Llama with donors in its KV pool, and prompts that quote them."""

from __future__ import annotations

import numpy as np
import torch

from a3_sglang.fusion.executor import Executor
from a3_sglang.fusion.ops import TorchOps
from a3_sglang.fusion.request import FusionRequest
from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.plan import make_plan
from a3_sglang.matching.search import find_spans
from a3_sglang.selectors import Selector
from helpers.reference import Llama

MIN_SPAN = 8


class Scenario:
    """A small Llama, donors with exact KV in random slots of its pool, and prompts that quote them.

    With an even seed it has sliding windows, capped logits and attention sinks.

    Args:
        seed: of the weights and of everything drawn later.
        donors: number of donors, 100 tokens each.
    """

    def __init__(self, seed: int, donors: int = 2) -> None:
        self.model = Llama(seed, plain=bool(seed % 2))
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.random = np.random.default_rng(seed + 2)
        self.free = torch.randperm(len(self.model.keys[0]), generator=self.generator)
        self.index = AnyPositionIndex(MIN_SPAN)
        self.donors = [self.tokens(100) for _ in range(donors)]
        self.slots_of = {}
        for donor in self.donors:
            self.index.add("space", donor)
            self.slots_of[donor.tobytes()] = self.write(*self.model.prefill64(torch.from_numpy(donor).long())[:2])

    def tokens(self, count: int) -> np.ndarray:
        """New random tokens, int32."""
        return self.random.integers(0, self.model.shape.vocabulary, count).astype(np.int32)

    def take(self, count: int) -> torch.Tensor:
        """Free slots, in random order."""
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count
        return taken

    def write(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
        """Write KV, (tokens, kv_heads, head_dim) per layer, to free slots; which ones."""
        slots = self.take(len(keys[0]))
        for layer in range(self.model.depth):
            self.model.keys[layer][slots] = keys[layer].float()
            self.model.values[layer][slots] = values[layer].float()
        return slots

    def prompt(self, prefix: int, pieces: list[tuple[int, int]], tail: int) -> np.ndarray:
        """``prefix`` new tokens, pieces of (new tokens, donor tokens in whole blocks), then ``tail`` new tokens."""
        parts = [self.tokens(prefix)]
        for gap, span in pieces:
            donor = self.donors[self.random.integers(len(self.donors))]
            span -= span % self.index.block
            begin = self.random.integers(0, (len(donor) - span) // self.index.block + 1) * self.index.block
            parts += [self.tokens(gap), donor[begin : begin + span]]
        return np.concatenate([*parts, self.tokens(tail)])

    def request(
        self, prompt: np.ndarray, prefix: int, selector: Selector, ratio: float, executor: Executor
    ) -> FusionRequest:
        """A planned request: the prefix's KV is in its slots, the spans are copied."""
        plan = make_plan(find_spans(self.index, "space", prompt, prefix), prefix, len(prompt), len(prompt), 1)
        assert plan is not None
        tokens = torch.from_numpy(prompt).long()
        full_keys, full_values, _ = self.model.prefill64(tokens)
        slots = torch.cat(
            [
                self.write([k[:prefix] for k in full_keys], [v[:prefix] for v in full_values]),
                self.take(plan.end - prefix),
            ]
        )
        request = FusionRequest(plan, tokens, slots, selector, ratio)
        donor_slots = []
        for span in plan.spans:
            path = span.segment.path(span.donor_end)
            donor = next(d for d in self.donors if np.array_equal(d[: len(path)], path))
            donor_slots.append(self.slots_of[donor.tobytes()][span.offset : span.offset + span.length])
        executor.copy(request, torch.cat(donor_slots))
        return request


def executor_for(scenario: Scenario, slice_rows: int = 8192) -> Executor:
    return Executor(scenario.model, TorchOps(), slice_rows)
