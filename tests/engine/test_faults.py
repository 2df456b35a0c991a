"""No error in any stage of a fusion ends the server, loses a slot or changes another request's answer."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from a3_sglang.client import engine, environment, flush, generate
from a3_sglang.integration.circuit_breaker import LIMIT
from a3_sglang.reporting.report import PARTS
from helpers.engines import OPTIONS
from helpers.traffic import Traffic, answer

PLUGINS = Path(__file__).parent / "plugins"
sys.path.append(str(PLUGINS))
from a3_test_faults import STAGES, VARIABLE  # noqa: E402

pytestmark = pytest.mark.engine

# In float32 an answer does not depend on the other requests of its batch.
ARGUMENTS = {"chunked_prefill_size": 2048, "max_total_tokens": 16384, "dtype": "float32"}
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "2", "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1"}
"""SGLang's own checks of its pool, after every batch."""


class Faulty:
    """An engine in which each stage can be made to fail once."""

    def __init__(self, traffic: Traffic, faults: Path) -> None:
        self.traffic, self.running, self._faults = traffic, traffic.running, faults
        self.plain = [(ids, answer(traffic.ask(ids, False))[0]) for ids in (traffic.tokens(150) for _ in range(3))]

    def fail(self, *stages: str) -> None:
        self._faults.write_text("\n".join(stages))

    @property
    def pending(self) -> str:
        """Stages that have not failed yet."""
        return self._faults.read_text()

    def donate(self) -> None:
        flush(self.running, 60)
        self.traffic.renew()
        self.traffic.ask(self.traffic.prompt(list(range(8))), False)

    def wave(self, fused: int = 3) -> list[dict[str, Any] | Exception]:
        """Send fused and plain requests at once, and check the plain answers. Returns the results of the fused ones."""

        async def one(ids: list[int], option: Any) -> Any:
            params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True, "custom_params": {"a3": option}}
            try:
                return await self.running.async_generate(input_ids=ids, sampling_params=params)
            except Exception as error:
                return error

        async def all_at_once() -> list[Any]:
            prompts = [self.traffic.prompt() for _ in range(fused)]
            wanted = [one(ids, {"ratio": 0.3}) for ids in prompts] + [one(ids, False) for ids, _ in self.plain]
            return await asyncio.gather(*wanted)

        outs = self.running.loop.run_until_complete(all_at_once())
        for (_, expected), out in zip(self.plain, outs[fused:], strict=True):
            assert list(out["output_ids"]) == expected
        return outs[:fused]


@pytest.fixture(scope="module")
def faulty(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    faults = tmp_path_factory.mktemp("faults") / "stages"
    with (
        environment(**STRICT, **{VARIABLE: str(faults)}, **OPTIONS, A3_EXPLAIN="on"),
        engine(tiny, "a3", **ARGUMENTS) as running,
    ):
        yield Faulty(Traffic(running, seed=3), faults)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("full recompute", "detail")])
def test_a_stage_that_fails_is_a_full_prefill(faulty: Faulty, stage: str) -> None:
    faulty.donate()
    faulty.fail(stage)
    outs = faulty.wave()
    assert faulty.pending == ""
    for out in outs:
        assert not isinstance(out, Exception), out
        assert len(out["output_ids"]) == 6
        report = out["meta_info"]["a3"]
        assert sum(report[part] for part in PARTS) == out["meta_info"]["prompt_tokens"]
    if stage not in ("indexing", "slots"):
        assert any(out["meta_info"]["a3"]["reason"] == "error" for out in outs)
    # The next requests are fused: fusion was not turned off, and no slot is still in use.
    faulty.donate()
    assert all(out["meta_info"]["a3"]["reason"] is None for out in faulty.wave())
    flush(faulty.running, 60)


def test_what_cannot_even_be_recomputed_is_an_error_for_that_request_alone(faulty: Faulty) -> None:
    faulty.donate()
    faulty.fail("probe", "full recompute")
    outs = faulty.wave()
    assert faulty.pending == ""
    failed = [out for out in outs if isinstance(out, Exception) or out["meta_info"]["finish_reason"]["type"] == "abort"]
    assert len(failed) == 1
    assert all(len(out["output_ids"]) == 6 for out in outs if out is not failed[0])
    faulty.donate()
    assert all(out["meta_info"]["a3"]["reason"] is None for out in faulty.wave())
    flush(faulty.running, 60)


def test_a_detail_that_fails_costs_nothing_else(faulty: Faulty) -> None:
    faulty.donate()
    faulty.fail("detail")
    options = {"explain": True, "keep": False}
    ids = faulty.traffic.prompt()
    failed, again = (faulty.traffic.ask(ids, options) for _ in range(2))
    assert faulty.pending == ""
    assert answer(failed) == answer(again)
    assert failed["meta_info"]["a3"] == again["meta_info"]["a3"] | {"detail": None}
    assert again["meta_info"]["a3"]["detail"] is not None
    assert again["meta_info"]["a3"]["reason"] is None


def test_after_repeated_errors_the_server_continues_as_stock(faulty: Faulty) -> None:
    """The last test of this engine, since fusion stays off."""
    faulty.donate()
    faulty.fail(*["copy"] * LIMIT)
    while faulty.pending:
        faulty.wave(fused=1)
    flush(faulty.running, 60)
    faulty.traffic.ask(faulty.traffic.prompt(list(range(8))), False)
    for out in faulty.wave():
        assert out["meta_info"]["a3"]["reason"] == "disabled after errors"
        assert out["meta_info"]["a3"]["reused"] == 0
    flush(faulty.running, 60)


def test_observing_goes_on_unless_failures_come_in_a_row(tiny: str, tmp_path: Path) -> None:
    faults = tmp_path / "stages"
    variables = {VARIABLE: str(faults), **OPTIONS, "A3_MODE": "observe"}
    with environment(**variables), engine(tiny, "a3", **ARGUMENTS) as running:
        traffic = Traffic(running, seed=5)
        for stages in (["search", ""] * LIMIT) + ["search"] * LIMIT:
            faults.write_text(stages)
            report = generate(running, traffic.tokens(150))["meta_info"]["a3"]
            assert report["reason"] == ("error" if stages else "nothing to reuse")
        assert "a3" not in generate(running, traffic.tokens(150))["meta_info"]
