"""A small RAG app: upload documents, ask questions, see which KV was reused.

python examples/rag_app/app.py --url http://127.0.0.1:30000     # uses a running server
python examples/rag_app/app.py --model MODEL -- --dtype float32  # starts a server with the arguments after --
"""

from __future__ import annotations

import argparse
import json
import signal
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import openai
import uvicorn
from ask import SYSTEM, Event, answer
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from store import Passage, Store, cut

from a3_sglang.local_server import StartError, local_server
from a3_sglang.warm import Document, ServerError, warm

LARGEST = 1_000_000
"""Most bytes of an upload."""
LONGEST_QUESTION = 2000
FOUND = 6
"""Most passages in a prompt."""
SERVER = ("--a3-report", "exact", "--max-total-tokens", "32768")
"""Arguments of a server that the app starts: exact counts, as the app is its only client, and a small KV pool."""


class Question(BaseModel):
    question: str
    compare: bool = True


def create_app(url: str, store: Store) -> FastAPI:
    """The app's routes. Slow ones stream their answer, one line of JSON per event.

    Args:
        url: of the SGLang server.
        store: holds the passages.
    """
    # FastAPI's own pages load scripts from other hosts.
    app = FastAPI(title="a3 RAG app", docs_url=None, redoc_url=None)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    @app.get("/documents")
    async def documents() -> list[dict[str, Any]]:
        return [{"name": name, "passages": count} for name, count in store.documents()]

    @app.post("/documents")
    async def upload(name: Annotated[str, Query(min_length=1)], request: Request) -> StreamingResponse:
        passages = cut(await text_of(request, name))
        if not passages:
            raise HTTPException(422, f"“{name}” is empty.")
        store.add(name, passages)
        return ndjson(prefill(url, [Passage(name, text) for text in passages]))

    @app.delete("/documents")
    async def remove(name: str) -> None:
        store.remove(name)

    @app.post("/prefill")
    async def prefill_all() -> StreamingResponse:
        return ndjson(prefill(url, store.passages()))

    @app.post("/ask")
    async def ask(asked: Question) -> StreamingResponse:
        question = asked.question.strip()
        if not question:
            raise HTTPException(422, "The question is empty.")
        if len(question) > LONGEST_QUESTION:
            raise HTTPException(422, f"The question is longer than {LONGEST_QUESTION} characters.")
        found = store.search(question, FOUND)
        if not found:
            message = "No passage has a word of this question." if store.documents() else "Add a document first."
            return ndjson([{"type": "error", "message": message}])
        return ndjson(answer(client, found, question, asked.compare))

    app.mount("/", StaticFiles(directory=Path(__file__).parent / "static", html=True))
    return app


async def text_of(request: Request, name: str) -> str:
    """The text of an upload.

    Raises:
        HTTPException: the upload is too large, or is not text.
    """
    body, size = bytearray(), 0
    # Always read to the end: a browser does not show an answer that arrives before it has sent everything.
    async for piece in request.stream():
        size += len(piece)
        if size <= LARGEST:
            body += piece
    if size > LARGEST:
        raise HTTPException(413, f"“{name}” is larger than {LARGEST // 1_000_000} MB.")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise HTTPException(415, f"“{name}” is not a text file in UTF-8.")
    return text


def prefill(url: str, passages: list[Passage]) -> Iterator[Event]:
    """Have the server compute the passages' KV, so that the first question finds it."""
    documents, computed, errors = (Document(passage.text, passage.document) for passage in passages), 0, []
    try:
        for done, one in enumerate(warm(url, documents, system=SYSTEM), 1):
            computed += one.tokens - one.cached
            errors += [one.error] if one.error else []
            yield {"type": "progress", "done": done, "of": len(passages), "computed": computed}
    except ServerError as error:
        errors.append(str(error))
    if errors:
        message = f"The text is stored and can be asked about, but is not all prefilled: {errors[-1]}"
        yield {"type": "error", "message": message}


def ndjson(events: AsyncIterator[Event] | Iterator[Event] | list[Event]) -> StreamingResponse:
    if isinstance(events, AsyncIterator):
        lines: Any = (json.dumps(event) + "\n" async for event in events)
    else:
        lines = (json.dumps(event) + "\n" for event in events)
    return StreamingResponse(lines, media_type="application/x-ndjson")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument("--url", help="of an SGLang server with a3")
    server.add_argument("--model", help="model folder or Hub id; the app starts a server")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--database", default=":memory:", help="file that keeps the documents; default: in memory")
    parser.add_argument("arguments", nargs="*", help="of the server that the app starts, after --")
    args = parser.parse_args()
    if args.url and args.arguments:
        parser.error("arguments after -- are for a server that --model starts")
    try:
        store = Store(args.database)
    except sqlite3.Error as error:
        parser.error(f"--database {args.database}: {error}")
    # Exit through the ExitStack below, which stops the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with ExitStack() as stack:
        url = args.url
        if args.model:
            log = Path(tempfile.mkdtemp(prefix="a3-rag-app-")) / "server.log"
            print(f"starting the model server, log: {log}", flush=True)
            try:
                url = stack.enter_context(local_server(args.model, log, *SERVER, *args.arguments))
            except StartError as error:
                print(error, file=sys.stderr)
                return 1
        # uvicorn prints the address of the page.
        uvicorn.run(create_app(url.rstrip("/"), store), host=args.host, port=args.port, access_log=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
