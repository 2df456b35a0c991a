"""Distances between answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence of next-token distributions, in nats.

    Args:
        reference: logits, (tokens, vocabulary).
        other: logits of the same shape.

    Raises:
        FloatingPointError: a logit is not finite.
    """
    if not bool(torch.isfinite(reference).all() & torch.isfinite(other).all()):
        raise FloatingPointError("logits are not finite")
    p, q = (logits.double().log_softmax(-1) for logits in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def agreement(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Share of tokens with the same most likely next token."""
    return float((reference.argmax(-1) == other.argmax(-1)).double().mean())


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (the SQuAD normalization, arXiv 1606.05250)."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(answer: str, right: Sequence[str]) -> float:
    """Word overlap with the best of the right answers, from 0 to 1."""

    def one(expected: str) -> float:
        mine, theirs = Counter(words(answer)), Counter(words(expected))
        common = (mine & theirs).total()
        return 2 * common / (mine.total() + theirs.total()) if common else float(mine == theirs)

    return max(one(expected) for expected in right)


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is one of the right ones, else 0."""
    return float(any(words(answer) == words(expected) for expected in right))
