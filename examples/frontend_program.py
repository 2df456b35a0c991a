"""A frontend program over documents: two questions in forks over one context, then a choice.

    python examples/frontend_program.py --url http://127.0.0.1:30000

The server needs `--radix-cache-backend a3`. In the second order, the documents' KV is reused at new positions.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import sglang as sgl

from a3_sglang.frontend import Endpoint, documents, report

TOWN = json.loads(Path(__file__).with_name("town.json").read_text(encoding="utf-8"))
DOCUMENTS = [f"{one['title']}: {one['text']}" for one in TOWN["passages"][:6]]


@sgl.function
def ask(s: Any, order: list[int], questions: list[str]) -> None:
    s += sgl.user_begin() + documents(DOCUMENTS[i] for i in order)
    forks = s.fork(len(questions))
    for fork, question in zip(forks, questions, strict=True):
        fork += question + sgl.user_end()
        fork += sgl.assistant(sgl.gen("answer", max_tokens=16, temperature=0))
    forks.join()
    s["answers"] = [fork["answer"].strip() for fork in forks]
    s["reports"] = [report(fork, "answer") for fork in forks]
    s += "Is there a museum?" + sgl.user_end()
    s += sgl.assistant(sgl.gen("museum", choices=["yes", "no"], temperature=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    sgl.set_default_backend(Endpoint(parser.parse_args().url))
    for order in ([0, 1, 2, 3, 4, 5], [2, 4, 0, 5, 1, 3]):
        started = time.perf_counter()
        state = ask.run(order, ["When was the harbour built?", "How long does the ferry take?"])
        print(f"documents in order {order}: {(time.perf_counter() - started) * 1e3:.0f} ms")
        for answer, found in zip(state["answers"], state["reports"], strict=True):
            print(f"  {answer!r}: {found}")
        print(f"  museum: {state['museum']}")


if __name__ == "__main__":
    main()
