"""What the cache knows about one request, and which requests are never fused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from a3_sglang.config import ResolvedOptions
from a3_sglang.fusion.request import FusionRequest
from a3_sglang.matching.branches import Branch
from a3_sglang.matching.plan import Plan
from a3_sglang.matching.search import PromptSearch
from a3_sglang.reporting.report import Reason
from a3_sglang.timing import Timings


@dataclass(slots=True)
class Match:
    """What was found for a request when it was last matched.

    Attributes:
        branch: where the KV of its prefix becomes approximate; None: the prefix is exact.
        limit: prompt tokens that may come from a cache.
        plan: what the next step of the prefill reuses; None: nothing.
        next_pos: position at which the step after that can reuse tokens; None: there is no such step.
        generation: of the branch that the plan begins, if it begins one.
        reason: why there is no plan, or why everything was recomputed.
        reusable: tokens that the last plan could have reused; reported if they were too few.
    """

    branch: Branch | None = None
    limit: int = 0
    plan: Plan | None = None
    next_pos: int | None = None
    generation: int = 1
    reason: Reason | None = None
    reusable: int = 0


@dataclass(slots=True)
class Admission:
    """The slots of an admitted request's fusion.

    Attributes:
        private_slots: int64, slots after the prefix that the fusion fills.
        donor_slots: int64 (reused,), the donors' slots of the spans.
        pending: the fusion has not run yet.
        recomputed_pos: int64, prompt positions of the reused tokens that the fusion recomputed; None: it did not run.
    """

    private_slots: torch.Tensor
    donor_slots: torch.Tensor
    pending: bool = True
    recomputed_pos: torch.Tensor | None = None


@dataclass(slots=True)
class Progress:
    """What the steps of a request's prefill have done so far, in tokens of its prompt.

    Attributes:
        prefix: tokens that came from the tree.
        reused, recomputed, gap: tokens of the fusions.
        charged: rows with freshly computed QKV in the fusions, in rows of the whole model.
        complete: the whole prompt is computed.
    """

    prefix: int
    reused: int = 0
    recomputed: int = 0
    gap: int = 0
    charged: float = 0.0
    complete: bool = False

    @property
    def fused(self) -> int:
        """Tokens between the prefixes and the tails of the fusions."""
        return self.reused + self.recomputed + self.gap


@dataclass(slots=True)
class RequestState:
    """What the cache knows about one request; an attribute of the request, so both have the same lifetime.

    Attributes:
        options: the request's options; None until it is first matched.
        exact_search: search for its prompt among exact donors; None until it is first searched for.
        approximate_search: the same among approximate donors.
        prefix_hashes: see :func:`a3_sglang.matching.branches.prefix_hashes`; None until they are first needed.
        match: found by the last match.
        admissions: of the steps that fuse, since the last match, in order. Their tensors are created on another CUDA
            stream than the one that reads them, so they are kept as long as the request.
        progress: None before the first step.
        logged: the prompt was logged and counted in the metrics.
        fusions: those that have run, with their times, if the request asks where its tokens came from.
    """

    options: ResolvedOptions | None = None
    exact_search: PromptSearch | None = None
    approximate_search: PromptSearch | None = None
    prefix_hashes: npt.NDArray[np.uint64] | None = None
    match: Match = field(default_factory=Match)
    admissions: list[Admission] = field(default_factory=list)
    progress: Progress | None = None
    logged: bool = False
    fusions: list[tuple[FusionRequest, Timings]] = field(default_factory=list)

    @property
    def admission(self) -> Admission | None:
        """That of the last step that fuses; None: there was none."""
        return self.admissions[-1] if self.admissions else None

    @property
    def pending(self) -> Admission | None:
        """The admission whose fusion has not run yet; None: there is none."""
        return self.admission if self.admission is not None and self.admission.pending else None

    def forget_match(self) -> None:
        """Forget the last match and the steps since, because the request is matched again."""
        self.match, self.admissions, self.progress, self.fusions = Match(), [], None, []


def state_of(req: Any) -> RequestState:
    """The request's state, created on first use."""
    state = getattr(req, "a3", None)
    if state is None:
        state = req.a3 = RequestState()
    return state


def ineligible(req: Any, options: ResolvedOptions) -> Reason | None:
    """Why this request gets a full prefill whatever can be reused; None if it may be fused."""
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
        # The beams share one prompt, and SGLang drops their custom_params.
        ((getattr(params, "beam_width", None) or 1) > 1 or getattr(req, "beam_group", None) is not None, Reason.BEAM),
    )
    return next((reason for applies, reason in checks if applies), None)
