"""SGLang's frontend language with a3: per-program options, documents and reports."""

from __future__ import annotations

from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from a3_sglang.config import REQUEST_KEY, request_options
from a3_sglang.documents import documents

__all__ = ["OPTIONS", "Endpoint", "documents", "report"]

OPTIONS = "a3"
"""The variable that holds a program's options; forks inherit it."""


class Endpoint(RuntimeEndpoint):
    """SGLang's ``RuntimeEndpoint`` with options of a3 in its requests: ``sgl.set_default_backend(Endpoint(url))``.

    A program sets its options with ``s["a3"] = {"ratio": 0.3}`` (or ``False``, for a full prefill) before it
    generates; forks inherit them. They apply to ``gen``, ``gen(choices=...)`` and the prefill before a fork.

    Args:
        base_url: of the server.
        a3: default options of programs, see :class:`a3_sglang.config.RequestOptions`.
        more: arguments of ``RuntimeEndpoint``.
    """

    def __init__(self, base_url: str, a3: bool | dict[str, Any] = True, **more: Any) -> None:
        super().__init__(base_url, **more)
        request_options(a3)
        self._options = a3

    # RuntimeEndpoint passes the body of every request through this method.
    def _add_images(self, s: Any, data: dict[str, Any]) -> None:
        super()._add_images(s, data)
        options = s.variables.get(OPTIONS, self._options)
        request_options(options)
        data["sampling_params"]["custom_params"] = {REQUEST_KEY: options}


def report(state: Any, name: str) -> dict[str, Any] | None:
    """The report of reuse for a generated variable; None for a choice, which has no report.

    Args:
        state: of a finished program, or one of its forks.
        name: of the variable.
    """
    found: dict[str, Any] | None = (state.get_meta_info(name) or {}).get(REQUEST_KEY)
    return found
