"""An SGLang engine in this process and requests to it: starting, flushing, greedy requests, synthetic prompts."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from a3_sglang.cpu import SERVER_ARGUMENTS, serving_dtype
from a3_sglang.integration import engine as sglang_engine

Progress = Callable[[str], AbstractContextManager[None]]
"""Shows that something is being done: a context for as long as it takes, given what it is."""
StartEngine = Callable[..., AbstractContextManager[Any]]
"""Starts an engine of one model: ``start(backend, **arguments)``, see :func:`engine`."""
Step = Callable[[], None]
"""Called after every step of a piece of work."""


def engine_arguments(model: str, **overrides: Any) -> dict[str, Any]:
    """Arguments of ``sglang.Engine``; without a GPU they include those that SGLang needs to run on the CPU."""
    import torch

    arguments: dict[str, Any] = {"model_path": model, "log_level": "error", "random_seed": 1}
    if not torch.cuda.is_available():
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        arguments |= SERVER_ARGUMENTS | {
            "dtype": serving_dtype()[0],
            "max_total_tokens": 65536,
            "mem_fraction_static": 0.5,
        }
    return arguments | overrides


def _no_progress(title: str) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def engine(model: str, backend: str | None, progress: Progress = _no_progress, **overrides: Any) -> Iterator[Any]:
    """A running engine, shut down on exit.

    Args:
        model: folder or Hub id.
        backend: the radix cache backend; None: stock SGLang.
        progress: shows the start.
        overrides: arguments of ``sglang.Engine``, see :func:`engine_arguments`.
    """
    how = f"with --radix-cache-backend {backend}" if backend else "without a3"
    if backend is not None:
        overrides["radix_cache_backend"] = backend
    with progress(f"starting SGLang {sglang_engine.sglang_version()} {how}"):
        running = sglang_engine.start_engine(**engine_arguments(model, **overrides))
    try:
        yield running
    finally:
        running.shutdown()


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables, which the processes of an engine inherit; restored on exit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Prompts:
    """Prompts of random tokens: a system part, chunks in any order, a question.

    Args:
        vocabulary: tokens are drawn from 5 to ``vocabulary - 1``.
        context: tokens of the system part and the chunks together.
        chunks: number of chunks, at least 2.
        seed: of the random tokens.
        question: tokens of a question.

    Raises:
        ValueError: there are too few chunks.
    """

    def __init__(self, vocabulary: int, context: int, chunks: int, seed: int, question: int = 48) -> None:
        if chunks < 2:
            raise ValueError(f"chunks must be at least 2, as one cannot be moved, not {chunks}")
        self.random = random.Random(seed)
        self.vocabulary = vocabulary
        self.question_tokens = question
        system = min(32, context // 8)
        self.system = self.tokens(system)
        size = (context - system) // chunks
        self.chunks = [self.tokens(size) for _ in range(chunks)]
        self._orders: list[list[int]] = []

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return len(self.system) + sum(map(len, self.chunks)) + self.question_tokens

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(5, self.vocabulary) for _ in range(count)]

    def renew(self) -> None:
        """Draw a new system part and new chunks."""
        self._orders.clear()
        self.system = self.tokens(len(self.system))
        self.chunks = [self.tokens(len(chunk)) for chunk in self.chunks]

    def shuffled(self) -> list[int]:
        """The chunks with a new question, in another order than the first and the last time if there are that many."""
        order = self.random.sample(range(len(self.chunks)), len(self.chunks))
        known = self._orders if len(order) > 2 else self._orders[:1]
        while order in known:
            self.random.shuffle(order)
        self._orders = [*self._orders[:1], order]
        return self.system + [token for i in order for token in self.chunks[i]] + self.tokens(self.question_tokens)


def vocabulary_of(model: str) -> int:
    """Size of the model's vocabulary, without the last 64 tokens, which may be special ones."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    text = getattr(config, "text_config", config)
    return int(text.vocab_size) - 64


def flush(running: Any, patience: float = 30) -> None:
    """Empty an engine's cache.

    SGLang refuses while anything is in use, and a request's slots may be freed only after its answer has arrived.

    Raises:
        RuntimeError: SGLang still refuses after ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    while not running.flush_cache().success:
        if time.monotonic() > deadline:
            raise RuntimeError("the cache cannot be flushed: something is still held")
        time.sleep(0.1)


def generate(
    running: Any,
    ids: Sequence[int],
    tokens: int = 1,
    a3: Any = None,
    custom_params: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Send one greedy request.

    Args:
        running: the engine.
        ids: tokens of the prompt.
        tokens: length of the answer.
        a3: ``custom_params["a3"]``; None: not set.
        custom_params: the other custom parameters.
        more: other fields of the request.
    """
    params = _greedy(tokens, a3, custom_params)
    out: dict[str, Any] = sglang_engine.generate(running, input_ids=list(ids), sampling_params=params, **more)
    return out


def generate_all(running: Any, prompts: Sequence[Sequence[int]], a3: Any = None) -> list[dict[str, Any]]:
    """Send several greedy requests at once, for one token each."""
    ids, params = [list(prompt) for prompt in prompts], [_greedy(1, a3, None) for _ in prompts]
    out: list[dict[str, Any]] = sglang_engine.generate(running, input_ids=ids, sampling_params=params)
    return out


def _greedy(tokens: int, a3: Any, custom_params: dict[str, Any] | None) -> dict[str, Any]:
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    custom = (custom_params or {}) | ({} if a3 is None else {"a3": a3})
    return params | ({"custom_params": custom} if custom else {})
