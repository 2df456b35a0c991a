"""Loads like those of real users, measured on a running engine."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from a3_sglang.client import Step, flush

CHUNK = 512
"""Rows per prefill step of both engines."""
SETTLE_SECONDS = 0.2


@dataclass
class Sample:
    """One measured request.

    Attributes:
        row: of the table.
        ms: time to its first token, unless the row says otherwise; milliseconds.
        tokens: of its prompt.
        reused: tokens of its prompt whose KV a3 took from other positions or from fused prompts.
    """

    row: str
    ms: float
    tokens: int = 0
    reused: int = 0


@dataclass
class LoadClient:
    """Sends one load's requests to an engine. The same seed draws the same prompts for both engines.

    Attributes:
        running: the engine.
        vocabulary: tokens of the prompts are below it.
        context: tokens of a prompt's passages.
        random: source of the prompts.
        samples: the measured requests.
    """

    running: Any
    vocabulary: int
    context: int
    random: random.Random
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.system = self.tokens(32)
        self.passages = [self.tokens(self.context // 8) for _ in range(8)]

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(5, self.vocabulary) for _ in range(count)]

    def question(self) -> list[int]:
        return self.tokens(40)

    def prompt(self, passages: list[list[int]]) -> list[int]:
        return [*self.system, *(token for passage in passages for token in passage)]

    def shuffled(self) -> list[int]:
        return self.prompt(self.random.sample(self.passages, len(self.passages)))

    def shuffled_prompt(self) -> list[int]:
        """The passages in a new order, and a new question."""
        return [*self.shuffled(), *self.question()]

    def send_donor(self) -> None:
        """Earlier traffic: a prompt that contains the passages."""
        self.send(None, [*self.prompt(self.passages), *self.question()])

    def send(self, row: str | None, ids: list[int], tokens: int = 1, **more: Any) -> list[int]:
        """Send one request and return its answer; the time to its first token is recorded under ``row``, if given."""
        time.sleep(SETTLE_SECONDS)
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        started, first, out = time.perf_counter(), 0.0, {}
        for piece in self.running.generate(input_ids=ids, sampling_params=params, stream=True, **more):
            first, out = first or time.perf_counter(), piece
        self.record(row, first - started, [out], len(ids))
        answer: list[int] = out["output_ids"]
        return answer

    def send_all(self, row: str, prompts: list[list[int]], params: dict[str, Any], **more: Any) -> None:
        """Send several prompts in one call, and record the time until all are answered."""
        time.sleep(SETTLE_SECONDS)
        params = {"temperature": 0, "ignore_eos": True} | params
        started = time.perf_counter()
        outs = self.running.generate(input_ids=prompts, sampling_params=params, **more)
        self.record(row, time.perf_counter() - started, outs, sum(map(len, prompts)) * params.get("n", 1))

    def record(self, row: str | None, seconds: float, outs: list[dict[str, Any]], tokens: int) -> None:
        if row is None:
            return
        reports = [out["meta_info"].get("a3") or {} for out in outs]
        reused = sum(report.get("continued", 0) + report.get("reused", 0) for report in reports)
        self.samples.append(Sample(row, seconds * 1e3, tokens, reused))


def shuffled_once(client: LoadClient) -> None:
    for _ in range(3):
        flush(client.running)
        client.send_donor()
        client.send("shuffled once", client.shuffled_prompt())


def chat(client: LoadClient) -> None:
    client.send_donor()
    ids = client.shuffled_prompt()
    for turn in range(10):
        answer = client.send("chat over shuffled passages, " + ("later turns" if turn else "first turn"), ids, 8)
        ids = [*ids, *answer, *client.question()]


def own_document(client: LoadClient) -> None:
    shared = client.tokens(400)
    client.send(None, [*client.tokens(8), *shared, *client.question()])
    ids = [*client.tokens(8), *shared, *client.tokens(min(8192, 4 * client.context) - 900), *client.question()]
    for turn in range(4):
        answer = client.send("chat over an own document, " + ("later turns" if turn else "first turn"), ids, 8)
        ids = [*ids, *answer, *client.question()]


def one_context(client: LoadClient) -> None:
    client.send_donor()
    context = client.shuffled()
    for number in range(50):
        client.send(
            "50 questions over one context, " + ("from the second on" if number else "first"),
            [*context, *client.question()],
        )


def samples(client: LoadClient) -> None:
    for _ in range(2):
        flush(client.running)
        client.send_donor()
        client.send_all("n = 8", [client.shuffled_prompt()], {"n": 8, "temperature": 1.0, "max_new_tokens": 8})


def choices(client: LoadClient) -> None:
    """What sgl.gen(choices=...) sends: the prompt alone, then the prompt with each choice, for its logprobs."""
    for _ in range(2):
        flush(client.running)
        client.send_donor()
        ids = client.shuffled_prompt()
        time.sleep(SETTLE_SECONDS)
        started = time.perf_counter()
        client.running.generate(input_ids=ids, sampling_params={"max_new_tokens": 0})
        outs = client.running.generate(
            input_ids=[[*ids, *client.tokens(5)] for _ in range(4)],
            sampling_params={"max_new_tokens": 0, "temperature": 0},
            return_logprob=True,
            logprob_start_len=len(ids) - 2,
        )
        client.record("choices", time.perf_counter() - started, outs, 4 * len(ids))


def retries(client: LoadClient) -> None:
    client.send_donor()
    ids = client.shuffled_prompt()
    client.send(None, ids)
    for _ in range(4):
        client.send("retries", ids)


def half_new(client: LoadClient) -> None:
    for _ in range(3):
        flush(client.running)
        client.send_donor()
        passages = [client.passages[i] if i % 2 else client.tokens(client.context // 8) for i in range(7, -1, -1)]
        client.send("half new documents, first", [*client.prompt(passages), *client.question()])
        client.random.shuffle(passages)
        client.send("half new documents, again in another order", [*client.prompt(passages), *client.question()])


def moving_corpus(client: LoadClient) -> None:
    """Passages drawn by Zipf's law; a tenth of the corpus is replaced before every batch of ten prompts."""
    corpus = [client.tokens(client.context // 8) for _ in range(40)]
    weights = [1 / (rank + 1) for rank in range(len(corpus))]
    for batch in range(10):
        for place in client.random.sample(range(len(corpus)), len(corpus) // 10) if batch else ():
            corpus[place] = client.tokens(client.context // 8)
        for _ in range(10):
            chosen: list[int] = []
            while len(chosen) < 8:
                place = client.random.choices(range(len(corpus)), weights)[0]
                if place not in chosen:
                    chosen.append(place)
            ids = [*client.prompt([corpus[place] for place in chosen]), *client.question()]
            client.send(f"moving corpus, batch {batch + 1:2}", ids)
            if batch:  # Ten prompts say little about one batch.
                client.samples.append(replace(client.samples[-1], row="moving corpus, second to tenth batch"))


def nothing(client: LoadClient) -> None:
    for _ in range(8):
        client.send("nothing to reuse", client.tokens(client.context))


def concurrent(client: LoadClient) -> None:
    client.send_donor()
    prompts = [client.shuffled_prompt() for _ in range(16)]
    client.send_all("16 concurrent", prompts, {"max_new_tokens": 1})


def stream(client: LoadClient) -> None:
    """One request decodes while requests with shuffled passages arrive."""
    client.send_donor()
    prompts = [client.shuffled_prompt() for _ in range(3)]
    gaps: list[float] = []

    async def decode() -> None:
        params = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
        last = None
        async for _ in await client.running.async_generate(
            input_ids=client.tokens(64), sampling_params=params, stream=True
        ):
            now = time.perf_counter()
            if last is not None:
                gaps.append(now - last)
            last = now

    async def arrive() -> None:
        for ids in prompts:
            await asyncio.sleep(0.4)
            await client.running.async_generate(input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": 1})

    async def both() -> None:
        await asyncio.gather(decode(), arrive())

    client.running.loop.run_until_complete(both())
    client.record("a stream's worst inter-token time while others arrive", max(gaps), [], 0)


LOADS: dict[str, Callable[[LoadClient], None]] = {
    "shuffled": shuffled_once,
    "chat": chat,
    "own": own_document,
    "questions": one_context,
    "samples": samples,
    "choices": choices,
    "retries": retries,
    "new": half_new,
    "moving": moving_corpus,
    "nothing": nothing,
    "concurrent": concurrent,
    "stream": stream,
}


def measure(
    running: Any, loads: Sequence[str], vocabulary: int, context: int, seed: int, step: Step
) -> Iterator[tuple[str, list[Sample]]]:
    """Send the loads to an engine.

    Args:
        running: the engine.
        loads: names in :data:`LOADS`.
        vocabulary: tokens of the prompts are below it.
        context: tokens of a prompt's passages.
        seed: of the prompts.
        step: called after a first load that warms up, and after each of ``loads``.

    Yields:
        The name and the samples of each load.
    """
    warm = LoadClient(running, vocabulary, context, random.Random(f"{seed} warm"))
    warm.send_donor()
    warm.send(None, warm.shuffled_prompt())
    step()
    for name in loads:
        flush(running)
        client = LoadClient(running, vocabulary, context, random.Random(f"{seed} {name}"))
        LOADS[name](client)
        step()
        yield name, client.samples


def compare(a3: list[Sample], stock: list[Sample]) -> list[dict[str, Any]]:
    """The table rows of one load: medians of both engines, their ratio, and the share of tokens that a3 reused."""
    return [
        _row(name, *([sample for sample in samples if sample.row == name] for samples in (a3, stock)))
        for name in dict.fromkeys(sample.row for sample in a3)
    ]


def _row(name: str, a3: list[Sample], stock: list[Sample]) -> dict[str, Any]:
    mine, theirs = (statistics.median(sample.ms for sample in samples) for samples in (a3, stock))
    tokens = sum(sample.tokens for sample in a3)
    return {
        "load": name,
        "a3_ms": round(mine, 2),
        "stock_ms": round(theirs, 2),
        "ratio": round(mine / theirs, 4),
        "reused_share": round(sum(sample.reused for sample in a3) / max(tokens, 1), 4),
    }
