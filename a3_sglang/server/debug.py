"""What ``verify`` and the tests look at inside a live engine; off unless asked for in the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from a3_sglang import seams

DUMP_VARIABLE = "A3_DUMP_KV"
"""Folder that receives ``<request id>.pt`` with the KV of each request after each of its extends."""


def dump_kv(tree: Any, batch: Any) -> None:
    """Save ``{"k", "v"}`` of every request of an extend batch, each (layers, tokens, kv_heads, head_dim).

    Does nothing unless ``A3_DUMP_KV`` names a folder. Files are whole when they appear.
    """
    folder = os.environ.get(DUMP_VARIABLE)
    if not folder or tree.executor is None:
        return
    model = tree.executor.model
    for req, prefix, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
        slots = seams.row(tree, req)[: prefix + length].to(torch.int64)
        kv = {
            "k": torch.stack([keys.index_select(0, slots) for keys in model.keys]).cpu(),
            "v": torch.stack([values.index_select(0, slots) for values in model.values]).cpu(),
        }
        target = Path(folder) / f"{req.rid}.pt"
        torch.save(kv, target.with_suffix(".part"))
        target.with_suffix(".part").rename(target)
