"""What may happen between match and copy, on SGLang's own tree, allocator, pool and requests without an engine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_sglang.config import ServerOptions
from a3_sglang.integration.request_state import state_of
from a3_sglang.reporting.report import PARTS, Reason
from helpers.tree import SLOTS, Cache, private_slots, text, tokens

# The constructors used here are those of the newest supported SGLang.
pytestmark = pytest.mark.engine


def test_donors_evicted_between_match_and_copy_are_a_miss(generator):
    cache = Cache()
    donor = text(generator, 120)
    cache.donate(donor)
    req = cache.request(tokens(generator, 10) + donor[40:] + tokens(generator, 40))
    assert cache.match(req) == 90
    cache.evict(SLOTS)
    assert cache.load(req) == 0
    assert state_of(req).match.reason == Reason.EVICTED
    assert cache.match(req) == 0
    assert cache.all_slots_back()


def test_the_copy_itself_cannot_evict_its_donors(generator):
    """Other KV is evicted to make room for the private slots; if that is not enough, there is no fusion."""
    cache = Cache()
    donor, other = text(generator, 200), tokens(generator, 300)
    cache.donate(donor)
    cache.donate(other)
    req = cache.request(donor[40:] + tokens(generator, 40))
    assert cache.match(req) == 160
    written = [keys.clone() for keys in cache.model.keys]
    assert cache.load(req) == 160
    cache.fuse(req)
    private = private_slots(req)
    assert len(cache.slots_of(donor)) == 200
    assert not torch.isin(private, cache.slots_of(donor)).any()
    for keys, before in zip(cache.model.keys, written, strict=True):
        untouched = torch.ones(len(keys), dtype=torch.bool)
        untouched[private] = False
        assert torch.equal(keys[untouched], before[untouched])
    cache.allocator.free(private)
    assert cache.all_slots_back()


def test_no_room_is_a_full_prefill(generator):
    cache = Cache()
    donor = text(generator, 300)
    cache.donate(donor)
    req = cache.request(tokens(generator, 8) + donor + tokens(generator, 40))
    assert cache.match(req) > 0
    assert cache.load(req) == 0
    assert state_of(req).match.reason == Reason.NO_ROOM
    assert cache.match(cache.request(donor + tokens(generator, 4))) == 0
    assert cache.all_slots_back()


def test_a_donors_slots_may_go_to_the_next_request_of_the_batch(generator):
    """Fusions run in admission order: the private slots of the second request are the donor slots of the first."""
    cache = Cache()
    donors = [text(generator, 150) for _ in "ab"]
    for donor in donors:
        cache.donate(donor)
    for pool in (*cache.model.keys, *cache.model.values):
        pool.normal_(generator=generator)
    held = [cache.slots_of(donor) for donor in donors]
    values = [[layer[slots].clone() for layer in cache.model.values] for slots in held]
    first, second = (
        cache.request(donor[4:] + tokens(generator, 40), rid, ratio=0.0)
        for donor, rid in zip(donors, "ab", strict=True)
    )
    assert (cache.match(first), cache.load(first)) == (146, 146)
    # It is used last, so the donor of the first request has to be evicted.
    assert (cache.match(second), cache.load(second)) == (146, 146)
    assert torch.isin(private_slots(second), held[0]).any()
    cache.fuse(first, second)
    for req, copied in zip((first, second), values, strict=True):
        for layer in range(cache.model.depth):
            assert torch.equal(cache.model.values[layer][private_slots(req)], copied[layer][4:])


def test_an_admission_without_a_forward_gives_its_slots_back(generator):
    """The request was not admitted after all, or was matched again before its batch ran."""
    cache = Cache()
    donor = text(generator, 152)
    cache.donate(donor)
    req = cache.request(donor[20:] + tokens(generator, 40))
    for number in range(6):
        assert cache.match(req) == 132
        free = cache.allocator.available_size()
        assert cache.load(req) == 132
        assert cache.allocator.available_size() == free - 132
        if number % 2:
            cache.tree.after_admission(req, admitted=False)
            assert cache.allocator.available_size() == free
    assert cache.all_slots_back()


def test_a_donor_evicted_after_the_match_is_replaced_by_another(generator):
    """The scheduler knows the start of the tail already; text that no donor holds any more becomes a gap."""
    cache = Cache()
    known, more = tokens(generator, 60), tokens(generator, 40)
    older = [0, *tokens(generator, 19), *known]
    cache.donate(older)
    cache.donate([1, *tokens(generator, 15), *known, *more])
    req = cache.request([2, *tokens(generator, 6), *known, *more, *tokens(generator, 40)])
    assert cache.match(req) == 107
    cache.slots_of(older)
    cache.evict(116)
    assert cache.load(req) == 107
    plan = state_of(req).match.plan
    assert plan.end == 107
    assert plan.reused == 60
    assert plan.gap == 47
    cache.fuse(req)
    assert sum(req.customized_info["a3"][0][part] for part in PARTS) == len(req.origin_input_ids)


def test_a_living_donor_is_found_past_stale_ones(generator):
    cache = Cache()
    known = tokens(generator, 32)
    first = [0, *tokens(generator, 19), *known]
    cache.donate(first)
    for number in range(1, 7):
        cache.donate([100 + number, *tokens(generator, 19), *known])
    cache.slots_of(first)
    cache.evict(6 * 52)
    assert len(cache.slots_of(first)) == 52
    req = cache.request([1, *tokens(generator, 8), *known, *tokens(generator, 40)])
    assert cache.match(req) == 41


def test_searching_does_not_split_the_tree(generator, capfd):
    """A donor is matched by its whole path, because matching a part of it would split a node for every request."""
    cache = Cache()
    donor = text(generator, 400)
    cache.donate(donor)

    def nodes() -> int:
        capfd.readouterr()
        cache.tree.pretty_print()
        return len(capfd.readouterr().out.splitlines())

    before = nodes()
    assert before >= 2
    for _ in range(20):
        begin = int(torch.randint(1, 300, (1,), generator=generator))
        req = cache.request([1, 2, 3, *donor[begin : begin + 50], *tokens(generator, 33)])
        assert cache.match(req) > 0
    assert nodes() == before


def test_a_request_is_searched_once_while_it_waits(generator, monkeypatch):
    """The policy matches it every round, and unrelated requests insert KV meanwhile."""
    cache = Cache()
    donor = text(generator, 200)
    cache.donate(donor)
    req = cache.request([0, 1, 2, 3, 4, *donor[40:], *tokens(generator, 40)])
    offered = cache.match(req)
    for _ in range(5):
        cache.donate(tokens(generator, 30))
        for _ in range(3):
            assert cache.match(req) == offered
    assert state_of(req).exact_search.searches == 1


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from([1, 16]))
def test_copied_keys_are_the_rotated_keys_of_the_donor(data, page_size):
    """Random donors and evictions: a fused prompt holds the donor's values at every reused position."""
    cache = Cache(page_size)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    whole = page_size * data.draw(st.integers(64 // page_size, 128 // page_size))
    donors = [tokens(generator, whole) for _ in range(3)]
    for donor in donors:
        cache.donate(donor)
    for keys, values in zip(cache.model.keys, cache.model.values, strict=True):
        keys.normal_(generator=generator)
        values.normal_(generator=generator)
    chosen = data.draw(st.permutations(range(3)))[:2]
    cut = data.draw(st.integers(1, 24))
    prompt = [t for i in chosen for t in [*tokens(generator, cut), *donors[i][cut:]]] + tokens(generator, 40)
    req = cache.request(prompt, ratio=0.0)
    offered = cache.match(req)
    cache.evict(data.draw(st.sampled_from([0, 0, whole, 2 * whole])))
    obtained = cache.load(req)
    assert obtained in (0, offered)
    if not obtained:
        assert state_of(req).match.reason is not None
        return
    cache.fuse(req)
    plan, private = state_of(req).match.plan, private_slots(req)
    assert plan.prefix % page_size == 0
    assert len(private) == plan.end - plan.prefix
    for span in plan.spans:
        path = prompt[span.start : span.end]
        donor = next(d for d in donors if d[span.offset : span.offset + span.length] == path)
        slots = cache.slots_of(donor)[span.offset : span.offset + span.length]
        mine = private[span.start - plan.prefix : span.end - plan.prefix]
        for values in cache.model.values:
            assert torch.equal(values[mine], values[slots])


def test_counts_do_not_depend_on_guesses_of_another_clients_secret(generator):
    """A client who knows the text before a secret attacks with many guesses at once.

    Blocks have 16 tokens. The secret is within one, which ends after it, so that no guess completes it.
    """
    cache = Cache(options=ServerOptions(report="exact", min_saving=0), slots=4000)
    digits = list(range(1000, 1010))
    form, secret = tokens(generator, 60), [digits[int(torch.randint(10, (1,), generator=generator))] for _ in range(6)]
    before = 100 + int(torch.randint(10, (1,), generator=generator))
    assert (before + 60) % 16 + len(secret) < 16
    cache.donate([0, *tokens(generator, before - 1), *form, *secret, *tokens(generator, 300)])
    mine = [1, *tokens(generator, 299)]
    cache.donate(mine)
    seen = set()
    for number in range(1000):
        known = secret[: number % len(secret)]
        guesses = [digit for digit in digits if torch.rand(1, generator=generator) < 0.5]
        prompt = [2, *mine[1:]]
        for guess in [*guesses, *[3] * (10 - len(guesses))]:
            prompt += [4, *(form + known)[-45:], guess]
        req = cache.request([*prompt, 5, *tokens(generator, 60)])
        cache.match(req)
        seen.add((len(known), state_of(req).match.plan.reused))
    # The counts are the same for every guess.
    assert len(seen) == len(secret)
