"""``a3-sglang bench``: time to first token of a3 and of stock SGLang, measured in the same run."""

from __future__ import annotations

from typing import Annotated

import typer

from a3_sglang.cli.common import (
    DtypeOption,
    JsonOption,
    ModelOption,
    VerboseOption,
    check_chunks,
    console,
    device_name,
    engines,
    print_table,
    resolve_dtype,
    write_json,
)
from a3_sglang.cli.equal import equal
from a3_sglang.cli.output import steps
from a3_sglang.cli.workloads import workloads
from a3_sglang.client import Prompts, environment, vocabulary_of
from a3_sglang.evaluation.ttft import STAGES, full_prefills, fused_prefills, summary
from a3_sglang.integration.engine import sglang_version

app = typer.Typer(no_args_is_help=True, help="Measure time to first token.")
app.command()(workloads)
app.command()(equal)


@app.command()
def ttft(
    model: ModelOption,
    context: Annotated[int, typer.Option(min=256, help="Tokens of a prompt before its question.")] = 4096,
    chunks: Annotated[int, typer.Option(min=2, help="Chunks of a prompt.")] = 8,
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of reused tokens to recompute.")] = 0.15,
    repeats: Annotated[int, typer.Option(min=1, help="Measured pairs.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Requests that are sent at once.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    dtype: DtypeOption = "auto",
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Time to first token of shuffled chunks: stock SGLang's full prefill against a3.

    One engine runs at a time, because two would compete for cores: first stock SGLang, then a3, which alternates
    between fused prefills and full ones (requests that turn fusion off). Prefill is not chunked in either engine,
    which is stock's best setting. The speed-up is against the faster of the two full prefills. For a batch, the time
    is that until every request has its first token. Fails if fusion does not engage.
    """
    check_chunks(context, chunks)
    prompts, start = Prompts(vocabulary_of(model), context, chunks, seed), engines(model)
    room = {"chunked_prefill_size": 2 * context * batch, "dtype": resolve_dtype(dtype)}
    with start(None, **room) as running, steps("measuring stock", repeats + 1) as step:
        stock = full_prefills(running, prompts, repeats, batch, step)
    with (
        environment(A3_TIMINGS="1", A3_REPORT="exact"),
        start("a3", **room) as running,
        steps("measuring a3", repeats + 1) as step,
    ):
        pairs = fused_prefills(running, prompts, ratio, repeats, batch, step)
    figures = summary(stock, pairs) | {
        "context": context,
        "chunks": chunks,
        "ratio": ratio,
        "repeats": repeats,
        "batch": batch,
        "device": device_name(),
        "dtype": room["dtype"],
        "sglang": sglang_version(),
    }
    print_table(
        f"time to first token, {context} tokens in {chunks} chunks, ratio {ratio}, medians of {repeats}"
        + (f", batches of {batch}" if batch > 1 else ""),
        ("", ""),
        [
            ("full prefill", f"{figures['full_ms']:.0f} ms"),
            ("a3", f"{figures['a3_ms']:.0f} ms"),
            *((f"  {stage}", f"{figures[stage + '_ms']:.1f} ms") for stage in STAGES),
            ("  share of selection (probe and select)", f"{figures['selection_share']:.1%}"),
            ("speed-up", f"{figures['speedup']:.2f}x"),
            ("nothing to reuse, a3 / stock", f"{figures['nothing_to_reuse']:.3f}"),
        ],
    )
    console.print(f"{figures['device']}, SGLang {figures['sglang']}, {model}")
    write_json(json, figures)
