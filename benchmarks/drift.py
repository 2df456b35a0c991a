"""Measures drift and prints it beside the model in ``a3_sglang/drift/model.py``.

    python benchmarks/drift.py --model DIR --data questions.json [--limit 10]

Runs the model in float32 over the prompts of ``a3-sglang eval`` and over their donors, and compares keys before RoPE
and values of the same tokens, layer by layer. Variances and covariances are in units of the variance of rows 100 to 180
of their span, averaged over layers, questions and spans longer than 320 rows; the model's values are in brackets.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from a3_sglang.config import DONOR_MODES
from a3_sglang.drift.model import DEFAULT
from a3_sglang.evaluation.prompts import Case, Writer
from a3_sglang.evaluation.questions import load
from a3_sglang.matching.index import AnyPositionIndex
from a3_sglang.matching.search import find_spans

OFFSETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
KINDS = {"keys": DEFAULT.keys, "values": DEFAULT.values}


def projected(model: PreTrainedModel, prompt: list[int]) -> dict[str, torch.Tensor]:
    """Keys before RoPE and values of all layers, (layers, tokens, kv_heads * head_dim)."""
    outputs: dict[str, list[torch.Tensor]] = {"keys": [], "values": []}
    hooks = [
        part.register_forward_hook(lambda _, __, out, kind=kind: outputs[kind].append(out[0]))
        for layer in model.model.layers
        for kind, part in (("keys", layer.self_attn.k_proj), ("values", layer.self_attn.v_proj))
    ]
    model.model(torch.tensor([prompt]))
    for hook in hooks:
        hook.remove()
    return {kind: torch.stack(layers) for kind, layers in outputs.items()}


def spans(
    model: PreTrainedModel, case: Case, donors: str, fresh: dict[str, torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """Drift of every span that is reused from donors of this mode, each (layers, tokens, kv_heads * head_dim)."""
    index, given = AnyPositionIndex(), []
    for donor in case.donors[donors]:
        index.add(None, np.array(donor, dtype=np.int32))
        given.append((donor, projected(model, donor)))
    prompt = np.array(case.prompt, dtype=np.int32)
    for span in find_spans(index, None, prompt, index.known_prefix(None, prompt)):
        path = span.segment.path(span.donor_end).tolist()
        old = next(kv for donor, kv in given if donor[: len(path)] == path)
        here, there = slice(span.start, span.end), slice(span.offset, span.offset + span.length)
        yield {kind: fresh[kind][:, here] - old[kind][:, there] for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--data", required=True, type=Path, help="JSON file of questions")
    parser.add_argument("--limit", type=int, default=10)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    writer, questions = Writer(AutoTokenizer.from_pretrained(args.model), 5, 400, 0), load(args.data)
    variances: defaultdict[tuple[str, str, int], list[float]] = defaultdict(list)
    shared: defaultdict[tuple[str, str, str, int], list[float]] = defaultdict(list)
    for i in range(args.limit):
        case = writer.case(questions, i)
        fresh = projected(model, case.prompt)
        for donors in DONOR_MODES:
            for span in spans(model, case, donors, fresh):
                for kind, drift in span.items():
                    if drift.shape[1] <= 64 + DISTANCES[-1]:
                        continue
                    unit = drift[1:, 100:180].square().sum(2).mean(1)
                    covariance = (drift[1:] @ drift[1:].transpose(1, 2) / unit[:, None, None]).mean(0)
                    for offset in OFFSETS:
                        variances[donors, kind, offset].append(float(covariance[offset, offset]))
                    for distance in DISTANCES:
                        along = covariance.diagonal(distance)
                        shared[donors, kind, "beginning", distance].append(float(along[0]))
                        shared[donors, kind, "deep", distance].append(float(along[64:].mean()))
    for donors in DONOR_MODES:
        for kind, predicted in KINDS.items():
            offsets = torch.arange(512)
            modelled, variance = predicted(offsets, offsets), predicted.variance(offsets)
            print(f"\n{donors}, {kind}")
            print(
                "variance by offset:      ",
                *(f"{o}: {np.mean(variances[donors, kind, o]):.2f} ({variance[o]:.2f})" for o in OFFSETS),
            )
            for place, offset in (("beginning", 0), ("deep", 128)):
                print(
                    f"covariance, {place:9s} by distance:",
                    *(
                        f"{d}: {np.mean(shared[donors, kind, place, d]):.2f} ({modelled[offset, offset + d]:.2f})"
                        for d in DISTANCES
                    ),
                )


if __name__ == "__main__":
    main()
