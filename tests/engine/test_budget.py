"""What a fusion computes counts in SGLang's budgets, with its own tree, allocator, requests and PrefillAdder."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from a3_sglang import plugin
from a3_sglang.config import ServerOptions
from a3_sglang.integration.request_state import state_of
from helpers.tree import Cache, text, tokens

# The constructors used here are those of the newest supported SGLang.
pytestmark = pytest.mark.engine

CHUNK = 1024
TAIL = 40


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Cache:
    cache = Cache(options=ServerOptions(report="exact"), slots=30_000)
    cache.tree.chunk = CHUNK
    monkeypatch.setattr(plugin, "_cache", cache.tree)
    return cache


class Scheduler:
    """One step of admissions, as in SGLang's scheduler."""

    def __init__(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        from sglang.srt.managers.schedule_policy import PrefillAdder

        # They need parts of a server, which does not exist here.
        monkeypatch.setattr(PrefillAdder, "_replay_len", lambda *_: 0)
        monkeypatch.setattr(PrefillAdder, "_account_prefill_cache_admission", lambda *_: None)
        self.cache = cache
        self.adder = PrefillAdder(1, cache.tree, cache.allocator, None, 0.5, 2 * CHUNK, CHUNK)

    def admit(self, prompts: list[list[int]]) -> list[Any]:
        """The requests for these prompts that the step admits."""
        from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

        # Engines of other tests may have installed the hook already.
        add_one_req = inspect.unwrap(PrefillAdder.add_one_req)
        for number, prompt in enumerate(prompts):
            req = self.cache.request(prompt, f"r{number}")
            req.sampling_params.max_new_tokens = 4
            req.init_next_round_input(self.cache.tree)
            result = plugin._admit(add_one_req, self.adder, req, has_chunked_req=False, truncation_align_size=None)
            if result is not AddReqResult.CONTINUE:
                break
        admitted: list[Any] = self.adder.can_run_list
        return admitted

    def rows(self) -> int:
        """Rows that the step computes: extends, fusions, and the probe's rows of the question."""
        return sum(req.extend_len + self.cache.tree.fusion_rows(req) for req in self.adder.can_run_list)


@pytest.fixture
def scheduler(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    return Scheduler(cache, monkeypatch)


@pytest.fixture
def documents(cache: Cache, generator: torch.Generator) -> list[list[int]]:
    drawn = [text(generator, 320) for _ in range(6)]
    cache.donate([1, *tokens(generator, 19), *(token for one in drawn for token in one)])
    return drawn


def shuffled(documents: list[list[int]], generator: torch.Generator) -> list[int]:
    order = torch.randperm(len(documents), generator=generator).tolist()
    # No part of the donor is a prefix.
    return [2, *(token for i in order for token in documents[i]), *tokens(generator, TAIL)]


def test_a_step_computes_no_more_rows_than_its_chunk(scheduler, documents, generator):
    admitted = scheduler.admit([shuffled(documents, generator) for _ in range(10)])
    assert all(state_of(req).match.plan is not None for req in admitted)
    # Each has 15% of 1,900 tokens, gaps, a tail and a question; counted by their tails alone, all ten would fit.
    assert 1 <= len(admitted) <= 2
    assert scheduler.rows() <= CHUNK
    assert scheduler.adder.rem_chunk_tokens == CHUNK - scheduler.rows()


def test_a_plan_ends_where_its_rows_fill_the_chunk(scheduler, documents, generator):
    """The rest of the prompt is left to the next steps."""
    new = [3, *tokens(generator, 999)]
    prompt = [2, *documents[0], *documents[1], *documents[2], *documents[4], *new, *documents[3], *tokens(generator, 9)]
    (req,) = scheduler.admit([prompt])
    plan = state_of(req).match.plan
    assert plan is not None
    # Whole blocks of the donor.
    assert 1 + 4 * 320 - 16 < plan.end <= 1 + 4 * 320
    assert 2281 <= state_of(req).match.next_pos < 2281 + 16
    assert scheduler.adder.new_chunked_req is req
    assert scheduler.rows() == CHUNK


def test_a_step_ends_where_the_next_can_reuse(scheduler, documents, generator):
    """New text leaves no room for a fusion, and no other request gets the rest of the chunk."""
    known = [token for document in documents[1:4] for token in document]
    prompt = [2, *tokens(generator, 949), *known, *tokens(generator, TAIL)]
    (req,) = scheduler.admit([prompt, tokens(generator, 50)])
    assert state_of(req).match.plan is None
    assert 950 <= state_of(req).match.next_pos == req.extend_len < 950 + 16
    assert scheduler.adder.new_chunked_req is req
    assert scheduler.adder.rem_chunk_tokens == 0


def test_a_step_that_decodes_takes_a_smaller_plan(scheduler, documents, generator):
    """Running requests use a part of mixed chunks; a plan that never fits would wait forever."""
    scheduler.adder.rem_chunk_tokens = 300
    (req,) = scheduler.admit([shuffled(documents, generator)])
    plan = state_of(req).match.plan
    assert plan is not None
    assert plan.reused > 900
    assert state_of(req).match.next_pos == plan.end
    assert scheduler.rows() <= 300


def test_a_request_that_is_not_admitted_costs_nothing(scheduler, documents, generator):
    scheduler.admit([tokens(generator, CHUNK - 100)])
    left = scheduler.adder.rem_chunk_tokens
    assert left == 100
    assert len(scheduler.admit([shuffled(documents, generator)])) == 1
    assert scheduler.adder.rem_chunk_tokens == left


def test_a_load_that_failed_is_charged_as_computed(scheduler, documents, generator, monkeypatch):
    monkeypatch.setattr(scheduler.cache.tree, "reserve", lambda _: None)
    (req,) = scheduler.admit([shuffled(documents, generator)])
    assert state_of(req).match.plan is None
    assert scheduler.rows() == req.extend_len <= CHUNK


@pytest.mark.parametrize("overhead", [0, 600])
def test_a_fusion_has_to_save_its_overhead(cache, documents, generator, overhead):
    """About 290 of 1,961 rows are recomputed; the tail and the probe have 40 each."""
    cache.tree.start(cache.tree.options, cache.executor, capacity=30_000, overhead=overhead)
    cache.donate([1, *tokens(generator, 19), *(token for one in documents for token in one)])
    req = cache.request(shuffled(documents, generator))
    assert cache.match(req) > 0
    short = cache.request([2, *documents[3], *documents[0], *tokens(generator, TAIL)])
    assert (cache.match(short) > 0) == (not overhead)


def test_the_log_counts_what_a_fusion_computes(scheduler, documents, generator):
    (req,) = scheduler.admit([shuffled(documents, generator)])
    computed = req.extend_len + scheduler.cache.tree.context_rows(req)
    assert scheduler.adder.log_input_tokens == computed
    assert scheduler.adder.log_hit_tokens == len(req.origin_input_ids) - computed


def test_policies_rank_by_what_is_left_to_compute(cache, documents, generator):
    from sglang.srt.managers.schedule_policy import CacheAwarePolicy, SchedulePolicy

    policy = SchedulePolicy("lpm", cache.tree, False, False, False)
    known = [*documents[1][:280], *tokens(generator, TAIL)]
    prompts = [shuffled(documents, generator), [1, *known], tokens(generator, 300)]
    reqs = [cache.request(prompt, f"r{number}") for number, prompt in enumerate(prompts)]
    plugin._rank(inspect.unwrap(SchedulePolicy._compute_prefix_matches), policy, reqs, CacheAwarePolicy.LPM)
    plan = state_of(reqs[0]).match.plan
    assert plan is not None
    assert reqs[0].num_matched_prefix_tokens == plan.end - plan.rows(0.15)
    assert [req.num_matched_prefix_tokens for req in reqs[2:]] == [0]
