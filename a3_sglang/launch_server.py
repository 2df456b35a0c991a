"""``python -m a3_sglang.launch_server``: SGLang's server with a3 and defaults for prompts over documents.

It takes all options of ``sglang.launch_server``; they take precedence over the defaults.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from a3_sglang.cpu import SERVER_ARGUMENTS, serving_dtype

# The cache report is usage.prompt_tokens_details.cached_tokens in OpenAI's answers.
DEFAULTS = {"radix_cache_backend": "a3", "enable_cache_report": True}


def arguments(given: Sequence[str], cuda: bool) -> list[str]:
    """A command line, followed by the defaults of options that it does not contain.

    Args:
        given: the command line.
        cuda: whether there is a GPU; if not, the server runs on the CPU.
    """
    defaults = DEFAULTS if cuda else DEFAULTS | SERVER_ARGUMENTS | {"dtype": serving_dtype()[0]}
    names = {argument.partition("=")[0] for argument in given}
    added = []
    for name, value in defaults.items():
        flag = "--" + name.replace("_", "-")
        if flag not in names:
            added += [flag] if value is True else [flag, str(value)]
    return [*given, *added]


def main() -> None:
    """Start the server."""
    import torch

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    sys.argv[1:] = arguments(sys.argv[1:], cuda)
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
