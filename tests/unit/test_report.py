"""The report of reuse: counts add up, and tell no more than they should."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from a3_sglang.reporting.report import PARTS, ROUNDING, Outcome, Reason

counts = st.lists(st.integers(0, 5000), min_size=len(PARTS), max_size=len(PARTS))


@given(counts)
def test_exact_counts_are_reported_as_they_are(parts):
    report = Outcome(tuple(parts), 0.123456789, "probe", None, 7).report(exact=True)
    assert [report[name] for name in PARTS] == parts
    assert report["charged"] == 0.123457
    assert report["reason"] is None
    assert "reusable" not in report


@given(counts)
def test_rounded_counts_add_up_to_the_prompt(parts):
    report = Outcome(tuple(parts), 0.123456789, "probe", None, 7).report(exact=False)
    rounded = [report[name] for name in PARTS]
    assert sum(rounded) == sum(parts)
    assert min(rounded) >= 0
    # The prompt's length is the client's own; what comes before the tail is told in multiples only.
    before = sum(rounded[:-1])
    assert before % ROUNDING == 0 or before == sum(parts)
    assert all(abs(found - given) <= ROUNDING for found, given in zip(rounded, parts, strict=True))
    assert all(found == 0 for found, given in zip(rounded[:-1], parts[:-1], strict=True) if given == 0)
    assert report["charged"] == 0.12


@given(st.integers(0, 5000), st.booleans())
def test_too_little_is_told_in_a_field_of_its_own(reusable, exact):
    report = Outcome((0, 0, 0, 0, 0, 9), 0.0, "probe", Reason.TOO_LITTLE, reusable).report(exact)
    assert report["reason"] == "too little to reuse"
    assert report["reusable"] == reusable if exact else report["reusable"] % ROUNDING == 0


def test_the_result_says_where_reused_kv_came_from():
    results = {"prefix": "full", "continued": "continued", "reused": "fused", "recomputed": "fused", "gap": "full"}
    for name, result in results.items():
        counts = tuple(64 * (part in (name, "tail")) for part in PARTS)
        assert Outcome(counts, 0.0, "probe", None, 0).result == result
    assert Outcome((0, 64, 64, 0, 0, 64), 0.0, "probe", None, 0).result == "fused"
