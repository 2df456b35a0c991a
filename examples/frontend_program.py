"""A frontend program over documents: two questions in forks over one context, then a choice.

    python examples/frontend_program.py --url http://127.0.0.1:30000

The server runs with `--radix-cache-backend a3`.
"""

from __future__ import annotations

import argparse
from typing import Any

import sglang as sgl

from a3_sglang.frontend import Endpoint, documents, report

DOCUMENTS = (
    "The harbour of Vall was built in 1871. Its breakwater is 900 metres long, and its lighthouse was the first in the "
    "country with an electric lamp. Until 1950 most of the town worked there.",
    "The ferry to the islands leaves Vall at seven in the morning and at four in the afternoon. It takes two hours and "
    "carries forty cars. In winter it goes once a day.",
    "Vall has a museum of navigation. It shows the old lamp of the lighthouse, a hundred ship models, and the letters "
    "of captain Ode, who drew the first charts of the islands.",
)


@sgl.function
def ask(s: Any, order: list[int], questions: list[str]) -> None:
    s += sgl.user_begin() + documents(DOCUMENTS[i] for i in order)
    forks = s.fork(len(questions))
    for fork, question in zip(forks, questions, strict=True):
        fork += question + sgl.user_end()
        fork += sgl.assistant(sgl.gen("answer", max_tokens=24, temperature=0))
    forks.join()
    s["answers"] = [fork["answer"].strip() for fork in forks]
    s["reports"] = [report(fork, "answer") for fork in forks]
    s += "Is there a museum?" + sgl.user_end()
    s += sgl.assistant(sgl.gen("museum", choices=["yes", "no"], temperature=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    sgl.set_default_backend(Endpoint(parser.parse_args().url))
    for order in ([0, 1, 2], [2, 0, 1]):
        state = ask.run(order, ["When was the harbour built?", "How long does the ferry take?"])
        print(f"documents in order {order}")
        for answer, found in zip(state["answers"], state["reports"], strict=True):
            print(f"  {answer!r}: {found}")
        print(f"  museum: {state['museum']}")


if __name__ == "__main__":
    main()
