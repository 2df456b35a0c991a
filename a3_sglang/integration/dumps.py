"""Dumps of KV and logits for ``verify``, ``eval`` and the tests, if the environment asks for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from a3_sglang.integration import compat

DUMP_VARIABLE = "A3_DUMP_KV"
"""Folder that receives ``<request id>.pt``; see :func:`dump_kv`."""
LOGITS_VARIABLE = "A3_DUMP_LOGITS"
"""Folder that receives ``<request id>.pt``; see :func:`dump_logits`."""
ANSWER_KEY = "a3_answer"
"""Key of ``custom_params`` for :func:`dump_logits`."""


def with_dumps(hook: Callable[..., Any], cache: Callable[[], Any]) -> Callable[..., Any]:
    """A hook around the worker's forward, which also dumps what the environment asks for.

    Args:
        hook: the hook without dumps; returned as it is if the environment asks for nothing.
        cache: returns the process's tree, or None.
    """
    kv_folder, logits_folder = os.environ.get(DUMP_VARIABLE), os.environ.get(LOGITS_VARIABLE)
    if not kv_folder and not logits_folder:
        return hook

    def forward(original: Callable[..., Any], worker: Any, batch: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = hook(original, worker, batch, *args, **kwargs)
        tree = cache()
        if tree is not None and batch is not None:
            if kv_folder and batch.forward_mode.is_extend():
                dump_kv(tree, batch, Path(kv_folder))
            if logits_folder:
                dump_logits(batch, result, Path(logits_folder))
        return result

    return forward


def dump_kv(cache: Any, batch: Any, folder: Path) -> None:
    """Save ``{"k", "v"}`` of every request of an extend batch, each (layers, tokens, kv_heads, head_dim).

    ``"recomputed"`` beside them has the positions of the reused tokens that were recomputed, or None if nothing was
    fused; ``"ropes"`` has the ``(cos_sin, neox)`` of each layer's :class:`~a3_sglang.rope.RopeTable` up to the last
    token. A file is complete when it appears.
    """
    model = cache.prefill.executor.model
    ropes = [model.ropes[layer] for layer in range(model.depth)]
    for req, prefix, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
        slots = compat.slots_of(cache, req)[: prefix + length].to(torch.int64)
        admission = req.a3.admission
        # Layers share tables, which are saved once.
        tables = {id(rope): rope.cos_sin[: len(slots)].cpu().clone() for rope in ropes}
        kv = {
            "k": torch.stack([keys.index_select(0, slots) for keys in model.keys]).cpu(),
            "v": torch.stack([values.index_select(0, slots) for values in model.values]).cpu(),
            "recomputed": admission.recomputed_pos if admission is not None else None,
            "ropes": [(tables[id(rope)], rope.neox) for rope in ropes],
        }
        _save(kv, folder / f"{req.rid}.pt")


def dump_logits(batch: Any, result: Any, folder: Path) -> None:
    """Save the logits of each token of an answer, float32 (tokens, vocabulary).

    A request asks for it with ``custom_params["a3_answer"]``: a number is the count of tokens to save; a list of token
    ids is an answer that is forced. Needs prefill in one chunk and no overlap scheduler.
    """
    for row, req in enumerate(batch.reqs):
        wanted = (req.sampling_params.custom_params or {}).get(ANSWER_KEY)
        if wanted is None:
            continue
        forced, count = (None, wanted) if isinstance(wanted, int) else (wanted, len(wanted))
        token = len(req.output_ids)
        if token >= count:
            continue
        saved = getattr(req, "a3_logits", None)
        if saved is None:
            saved = req.a3_logits = []
        saved.append(result.logits_output.next_token_logits[row].float().cpu().clone())
        if forced is not None:
            result.next_token_ids[row] = forced[token]
        if token + 1 == count:
            _save(torch.stack(saved), folder / f"{req.rid}.pt")


def _save(value: Any, target: Path) -> None:
    torch.save(value, target.with_suffix(".part"))
    target.with_suffix(".part").rename(target)
