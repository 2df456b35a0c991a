"""What ``verify``, ``eval`` and the tests look at inside a live engine; off unless asked for in the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from a3_sglang.integration import compat

DUMP_VARIABLE = "A3_DUMP_KV"
"""Folder that receives ``<request id>.pt`` with the KV of each request after each of its extends."""


def dump_kv(tree: Any, batch: Any) -> None:
    """Save ``{"k", "v"}`` of every request of an extend batch, each (layers, tokens, kv_heads, head_dim).

    Beside them ``"recomputed"``: positions of the reused rows that were recomputed, None where nothing was fused.
    Does nothing unless ``A3_DUMP_KV`` names a folder. Files are whole when they appear.
    """
    folder = os.environ.get(DUMP_VARIABLE)
    if not folder or tree.executor is None:
        return
    model = tree.executor.model
    for req, prefix, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
        slots = compat.row(tree, req)[: prefix + length].to(torch.int64)
        kv = {
            "k": torch.stack([keys.index_select(0, slots) for keys in model.keys]).cpu(),
            "v": torch.stack([values.index_select(0, slots) for values in model.values]).cpu(),
            "recomputed": req.a3.recomputed,
        }
        target = Path(folder) / f"{req.rid}.pt"
        torch.save(kv, target.with_suffix(".part"))
        target.with_suffix(".part").rename(target)


LOGITS_VARIABLE = "A3_DUMP_LOGITS"
"""Folder that receives ``<request id>.pt`` with the logits of answers; see :func:`dump_logits`."""
ANSWER_KEY = "a3_answer"


def dump_logits(batch: Any, result: Any) -> None:
    """Save the logits behind each token of an answer, float32 (tokens, vocabulary).

    Does nothing unless ``A3_DUMP_LOGITS`` names a folder and a request's ``custom_params["a3_answer"]`` asks for it:
    with a number, that many tokens of the answer are saved; with a list of token ids, the answer is forced to be
    these. Works with the overlap scheduler off and prefill in one chunk.
    """
    folder = os.environ.get(LOGITS_VARIABLE)
    if not folder:
        return
    for row, req in enumerate(batch.reqs):
        wanted = (req.sampling_params.custom_params or {}).get(ANSWER_KEY)
        if wanted is None:
            continue
        forced, count = (None, wanted) if isinstance(wanted, int) else (wanted, len(wanted))
        at = len(req.output_ids)
        if at >= count:
            continue
        kept = getattr(req, "a3_logits", None)
        if kept is None:
            kept = req.a3_logits = []
        kept.append(result.logits_output.next_token_logits[row].float().cpu().clone())
        if forced is not None:
            result.next_token_ids[row] = forced[at]
        if at + 1 == count:
            target = Path(folder) / f"{req.rid}.pt"
            torch.save(torch.stack(kept), target.with_suffix(".part"))
            target.with_suffix(".part").rename(target)
