"""SGLang's frontend language with a3; see :mod:`a3_sglang.integration.frontend`."""

from a3_sglang.integration.frontend import OPTIONS, Endpoint, documents, report

__all__ = ["OPTIONS", "Endpoint", "documents", "report"]
