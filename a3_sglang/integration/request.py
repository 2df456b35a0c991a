"""What the backend knows of one request, and why a request is not fused."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from a3_sglang.config import ResolvedOptions
from a3_sglang.fusion.request import FusionRequest
from a3_sglang.matching.branches import Branch
from a3_sglang.matching.index import PromptSearch
from a3_sglang.matching.plan import Plan
from a3_sglang.timing import Timings


class Reason(StrEnum):
    """Why a request got a full prefill; the values of the report's ``reason``."""

    OFF = "off"
    DONOR = "donor"
    INVALID = "invalid options"
    LORA = "LoRA adapter"
    EMBEDDINGS = "input embeddings"
    MULTIMODAL = "multimodal"
    SESSION = "session"
    BEAM = "beam search"
    NOTHING = "nothing to reuse"
    TOO_LITTLE = "too little to reuse"
    RENEWAL = "renews donors"
    EVICTED = "donors evicted"
    NO_ROOM = "no room"
    ERROR = "error"
    DISABLED = "disabled after errors"


@dataclass(slots=True)
class Done:
    """What the steps of a request's prefill have done so far, in tokens of its prompt.

    Attributes:
        prefix: came from the tree.
        reused, recomputed, gap: of the fusions.
        charged: rows with freshly computed QKV in the fusions, in rows of the whole model.
        complete: all of the prompt is computed.
    """

    prefix: int
    reused: int = 0
    recomputed: int = 0
    gap: int = 0
    charged: float = 0.0
    complete: bool = False

    @property
    def fused(self) -> int:
        """Tokens between prefixes and tails of the fusions."""
        return self.reused + self.recomputed + self.gap


@dataclass(slots=True)
class RequestState:
    """What the backend knows of one request; kept on the request, so it lives as long as that.

    Attributes:
        options: what the request runs with; None until it was first matched.
        search: the search for its prompt among exact donors; None until it was first searched for.
        search_approximate: the same among approximate ones.
        hashes: of its prompt's beginnings (:func:`prefix_hashes`); None until they were first needed.
        branch: where its KV becomes approximate; None: nowhere.
        limit: tokens of the prompt that may come from a cache.
        plan: what the next step of the prefill reuses.
        stop: position from which the step after that can reuse tokens; None: there is none.
        generation: of the branch that the plan begins, if it begins one.
        reason: why there is no plan, or why everything was recomputed.
        reusable: tokens that could have been reused, if they were too few.
        private: slots that the fusion fills, after the prefix, int64.
        sources: the donors' slots of its spans, int64 (reused,). Kept while the request lives, as it is made on
            another CUDA stream than the one that reads it.
        waiting: slots are allocated, the fusion has not run.
        recomputed: positions of the reused rows that the last fusion recomputed, int64.
        done: what the steps so far have done; None before the first.
        accounted: the prompt was logged and counted in the metrics.
        explained: the fusions so far and their times, if the request wants to know where its tokens came from.
    """

    options: ResolvedOptions | None = None
    search: PromptSearch | None = None
    search_approximate: PromptSearch | None = None
    hashes: npt.NDArray[np.uint64] | None = None
    branch: Branch | None = None
    limit: int = 0
    plan: Plan | None = None
    stop: int | None = None
    generation: int = 1
    reason: Reason | None = None
    reusable: int = 0
    private: torch.Tensor | None = None
    sources: torch.Tensor | None = None
    waiting: bool = False
    recomputed: torch.Tensor | None = None
    done: Done | None = None
    accounted: bool = False
    explained: list[tuple[FusionRequest, Timings]] = field(default_factory=list)

    def renew(self) -> None:
        """Before the request is matched again: what was found then does not count any more."""
        self.branch = self.plan = self.stop = self.reason = self.private = self.sources = None
        self.recomputed = self.done = None
        self.reusable, self.waiting, self.explained = 0, False, []


def state_of(req: Any) -> RequestState:
    """The request's state, made on first use."""
    state = getattr(req, "a3", None)
    if state is None:
        state = req.a3 = RequestState()
    return state


def ineligible(req: Any, options: ResolvedOptions) -> Reason | None:
    """Why this request gets a full prefill whatever the index holds; None if it may be fused."""
    params = req.sampling_params
    checks = (
        (not options.valid, Reason.INVALID),
        (options.question is not None and options.question[1] > len(req.origin_input_ids), Reason.INVALID),
        (not options.enabled, Reason.OFF),
        (options.donor, Reason.DONOR),
        (getattr(req, "lora_id", None) is not None, Reason.LORA),
        (getattr(req, "input_embeds", None) is not None, Reason.EMBEDDINGS),
        (getattr(req, "multimodal_inputs", None) is not None, Reason.MULTIMODAL),
        (getattr(req, "session", None) is not None, Reason.SESSION),
        # The rows of a beam share one prompt, and SGLang drops their custom_params.
        ((getattr(params, "beam_width", None) or 1) > 1 or getattr(req, "beam_group", None) is not None, Reason.BEAM),
    )
    return next((reason for applies, reason in checks if applies), None)
