"""SGLang's requests, and the budgets and counters of its scheduler."""

from __future__ import annotations

from typing import Any

import torch


def prefix_length(req: Any) -> int:
    """Number of prompt tokens that the request's next extend does not compute."""
    return req.prefix_len if hasattr(req, "prefix_len") else len(req.prefix_indices)


def set_protected_len(req: Any, length: int) -> None:
    """Say that the tree owns only the first ``length`` slots of the request."""
    if hasattr(req, "cache_protected_len"):
        req.cache_protected_len = length
    elif req.kv is not None:
        req.kv.cache_protected_len = length


def extend_prefix(tree: Any, req: Any, slots: torch.Tensor) -> None:
    """Append slots to the request's prefix between two chunks of its prefill."""
    if hasattr(req, "prefix_len"):
        end = req.prefix_len + len(slots)
        slots_of(tree, req)[req.prefix_len : end] = slots
        req.prefix_len = end
    else:
        req.prefix_indices = torch.cat([req.prefix_indices, slots.to(req.prefix_indices.dtype)])


def shorten_prefix(req: Any, length: int) -> None:
    """Undo :func:`extend_prefix`."""
    if hasattr(req, "prefix_len"):
        req.prefix_len = length
    else:
        req.prefix_indices = req.prefix_indices[:length]


def keep_computed(tree: Any, req: Any) -> None:
    """Make the KV that a request's chunks have computed its prefix.

    Before 0.5.23, SGLang forgets that KV if the request must not be inserted, and its next chunk computes it again.
    """
    if hasattr(req, "prefix_len") or not req.skip_radix_cache_insert:
        return
    computed = (req if hasattr(req, "kv_committed_len") else req.kv).kv_committed_len
    if computed > len(req.prefix_indices):
        req.prefix_indices = slots_of(tree, req)[:computed].to(req.prefix_indices.dtype, copy=True)


def take_budget(adder: Any, rows: int) -> None:
    """Subtract ``rows`` from the PrefillAdder's budget of the current step; a negative number adds to it."""
    adder.rem_input_tokens -= rows
    if adder.rem_chunk_tokens is not None:
        adder.rem_chunk_tokens -= rows


def limit_chunk(adder: Any, most: int | None) -> int:
    """Limit what is left of the step's chunk to ``most`` tokens (None: no limit); returns how many were withheld."""
    if most is None or adder.rem_chunk_tokens is None:
        return 0
    withheld: int = max(adder.rem_chunk_tokens - most, 0)
    adder.rem_chunk_tokens -= withheld
    return withheld


def unlimit_chunk(adder: Any, withheld: int) -> None:
    """Undo :func:`limit_chunk`."""
    if withheld:
        adder.rem_chunk_tokens += withheld


def log_as_cached(adder: Any, tokens: int) -> None:
    """Count tokens that joined a prefix between two chunks as cached in the scheduler's log and metrics."""
    adder.log_hit_tokens += tokens


def log_as_computed(adder: Any, req: Any, rows: int) -> None:
    """Count rows of an admitted request as computed, not as cached, in the scheduler's log and metrics."""
    adder.log_hit_tokens -= rows
    adder.log_input_tokens += rows
    if req.retracted_stain:
        adder.reprocessed_log_hit_tokens -= rows
        adder.reprocessed_log_input_tokens += rows


def count_as_computed(req: Any, rows: int) -> None:
    """Do not count ``rows`` rows between a request's prefix and its tail as cached; the other ones are on the device.

    SGLang has counted all of them as cached, and those of the first step as loaded from the host.
    """
    if req.retracted_stain:
        return
    req.cached_tokens -= rows
    req.cached_tokens_device, req.cached_tokens_host = req.cached_tokens, 0


def slots_of(tree: Any, req: Any) -> torch.Tensor:
    """The request's row of the pool that maps prompt positions to slots."""
    index = req.req_pool_idx if hasattr(req, "req_pool_idx") else req.kv.req_pool_idx
    return tree.req_to_token_pool.req_to_token[index]


def attach(req: Any, name: str, value: Any) -> None:
    """Put a value into the request's ``meta_info``, where SGLang delivers it as the first element of a list."""
    req.customized_info = {**(req.customized_info or {}), name: [value]}


def abort(req: Any, message: str) -> None:
    """End a request with an error after its next forward, and keep its KV out of the tree."""
    from http import HTTPStatus

    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    req.skip_radix_cache_insert = True
    req.to_finish = FINISH_ABORT(message, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
