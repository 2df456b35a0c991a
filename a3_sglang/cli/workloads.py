"""``a3-sglang bench workloads``: what users do, on stock SGLang with its prefix cache and on a3 in one run."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import typer

from a3_sglang.cli.output import Step, steps
from a3_sglang.client import (
    DtypeOption,
    JsonOption,
    ModelOption,
    VerboseOption,
    console,
    engine,
    environment,
    flush,
    print_table,
    resolve_dtype,
    vocabulary_of,
    write_json,
)

CHUNK = 512
"""Rows of a prefill step, in both engines."""
SETTLE_SECONDS = 0.2
CLOSE = 0.8
"""From this ratio on a load is measured on stock once more, after a3: how fast a machine is can drift by as much."""


@dataclass
class Sample:
    """One measured request.

    Attributes:
        row: of the table.
        ms: time to its first token, or what the row says.
        tokens: of its prompt.
        reused: tokens of its prompt that a3 took from approximate KV.
    """

    row: str
    ms: float
    tokens: int = 0
    reused: int = 0


@dataclass
class Client:
    """Sends one load's requests to an engine. The same seed draws the same prompts for both engines."""

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

    def know(self) -> None:
        """Earlier traffic: the passages were in a prompt before."""
        self.send(None, [*self.prompt(self.passages), *self.question()])

    def send(self, row: str | None, ids: list[int], tokens: int = 1, **more: Any) -> list[int]:
        """One request; its answer. The time to its first token goes to a row, None: to none."""
        time.sleep(SETTLE_SECONDS)
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        started, first, out = time.perf_counter(), 0.0, {}
        for piece in self.running.generate(input_ids=ids, sampling_params=params, stream=True, **more):
            first, out = first or time.perf_counter(), piece
        self.note(row, first - started, [out], len(ids))
        answer: list[int] = out["output_ids"]
        return answer

    def send_all(self, row: str, prompts: list[list[int]], params: dict[str, Any], **more: Any) -> None:
        """Several prompts in one call; the time until all are answered."""
        time.sleep(SETTLE_SECONDS)
        params = {"temperature": 0, "ignore_eos": True} | params
        started = time.perf_counter()
        outs = self.running.generate(input_ids=prompts, sampling_params=params, **more)
        self.note(row, time.perf_counter() - started, outs, sum(map(len, prompts)) * params.get("n", 1))

    def note(self, row: str | None, seconds: float, outs: list[dict[str, Any]], tokens: int) -> None:
        if row is None:
            return
        reports = [out["meta_info"].get("a3") or {} for out in outs]
        reused = sum(report.get("continued", 0) + report.get("reused", 0) for report in reports)
        self.samples.append(Sample(row, seconds * 1e3, tokens, reused))


def shuffled_once(client: Client) -> None:
    for _ in range(3):
        flush(client.running)
        client.know()
        client.send("shuffled once", client.shuffled_prompt())


def chat(client: Client) -> None:
    client.know()
    ids = client.shuffled_prompt()
    for turn in range(10):
        answer = client.send("chat over shuffled passages, " + ("later turns" if turn else "first turn"), ids, 8)
        ids = [*ids, *answer, *client.question()]


def own_document(client: Client) -> None:
    shared = client.tokens(400)
    client.send(None, [*client.tokens(8), *shared, *client.question()])
    ids = [*client.tokens(8), *shared, *client.tokens(min(8192, 4 * client.context) - 900), *client.question()]
    for turn in range(4):
        answer = client.send("chat over an own document, " + ("later turns" if turn else "first turn"), ids, 8)
        ids = [*ids, *answer, *client.question()]


def one_context(client: Client) -> None:
    client.know()
    context = client.shuffled()
    for number in range(50):
        client.send(
            "50 questions over one context, " + ("from the second on" if number else "first"),
            [*context, *client.question()],
        )


def samples(client: Client) -> None:
    for _ in range(2):
        flush(client.running)
        client.know()
        client.send_all("n = 8", [client.shuffled_prompt()], {"n": 8, "temperature": 1.0, "max_new_tokens": 8})


def choices(client: Client) -> None:
    """What sgl.gen(choices=...) sends: the prompt alone, then the prompt with each choice, to be scored."""
    for _ in range(2):
        flush(client.running)
        client.know()
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
        client.note("choices", time.perf_counter() - started, outs, 4 * len(ids))


def retries(client: Client) -> None:
    client.know()
    ids = client.shuffled_prompt()
    client.send(None, ids)
    for _ in range(4):
        client.send("retries", ids)


def half_new(client: Client) -> None:
    for _ in range(3):
        flush(client.running)
        client.know()
        passages = [client.passages[i] if i % 2 else client.tokens(client.context // 8) for i in range(7, -1, -1)]
        client.send("half new documents, first", [*client.prompt(passages), *client.question()])
        client.random.shuffle(passages)
        client.send("half new documents, again in another order", [*client.prompt(passages), *client.question()])


def moving_corpus(client: Client) -> None:
    """Passages by Zipf's law, a tenth of them replaced before every batch of ten."""
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
            if batch:  # Ten draws say little about a batch.
                client.samples.append(replace(client.samples[-1], row="moving corpus, second to tenth batch"))


def nothing(client: Client) -> None:
    for _ in range(8):
        client.send("nothing to reuse", client.tokens(client.context))


def concurrent(client: Client) -> None:
    client.know()
    prompts = [client.shuffled_prompt() for _ in range(16)]
    client.send_all("16 concurrent", prompts, {"max_new_tokens": 1})


def stream(client: Client) -> None:
    """A request that decodes while shuffled ones arrive."""
    client.know()
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
    client.note("a stream's worst inter-token time while others arrive", max(gaps), [], 0)


LOADS: dict[str, Callable[[Client], None]] = {
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


def workloads(
    model: ModelOption,
    context: Annotated[int, typer.Option(min=256, help="Tokens of a prompt's passages.")] = 2048,
    loads: Annotated[str, typer.Option(help=f"Which, separated by commas: {', '.join(LOADS)}.")] = ",".join(LOADS),
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    dtype: DtypeOption = "auto",
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Time to first token of what users do, a3 against stock SGLang with its prefix cache.

    Both engines get the same prompts and compute at most 512 rows per prefill step. A row of several requests is
    their median. Where the two are close, stock is measured before and after a3.
    """
    import sglang

    chosen = [name.strip() for name in loads.split(",")]
    if unknown := [name for name in chosen if name not in LOADS]:
        raise typer.BadParameter(f"unknown load {unknown[0]!r}; choose from {', '.join(LOADS)}", param_hint="--loads")
    vocabulary, room = vocabulary_of(model), {"chunked_prefill_size": CHUNK, "dtype": resolve_dtype(dtype)}

    def measure(backend: str | None, loads: list[str]) -> dict[str, list[Sample]]:
        with (
            environment(A3_REPORT="exact"),
            engine(model, backend, **room) as running,
            steps(f"measuring {backend or 'stock'}", len(loads) + 1) as step,
        ):
            return dict(_measure(running, loads, vocabulary, context, seed, step))

    stock, a3 = measure(None, chosen), measure("a3", chosen)
    close = [name for name in chosen if any(row["ratio"] >= CLOSE for row in _rows(a3[name], stock[name]))]
    if close:
        for name, samples in measure(None, close).items():
            stock[name] += samples
    rows = [row for name in chosen for row in _rows(a3[name], stock[name])]
    print_table(
        f"time to first token, {context} tokens of passages, SGLang {sglang.__version__}, medians",
        ("load", "a3", "stock", "a3 / stock", "reused"),
        [
            (
                row["load"],
                f"{row['a3_ms']:.0f} ms",
                f"{row['stock_ms']:.0f} ms",
                f"{row['ratio']:.2f}",
                f"{row['reused_share']:.0%}",
            )
            for row in rows
        ],
    )
    console.print(model)
    write_json(json, {"rows": rows, "context": context, "chunk": CHUNK, "seed": seed, "sglang": sglang.__version__})


def _measure(
    running: Any, loads: list[str], vocabulary: int, context: int, seed: int, step: Step
) -> Iterator[tuple[str, list[Sample]]]:
    """The samples of each load."""
    warm = Client(running, vocabulary, context, random.Random(f"{seed} warm"))
    warm.know()
    warm.send(None, warm.shuffled_prompt())
    step()
    for name in loads:
        flush(running)
        client = Client(running, vocabulary, context, random.Random(f"{seed} {name}"))
        LOADS[name](client)
        step()
        yield name, client.samples


def _rows(a3: list[Sample], stock: list[Sample]) -> list[dict[str, Any]]:
    """The table's rows of one load."""
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
