"""``a3-sglang explain``: a page that shows how every token of a prompt was obtained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from a3_sglang.cli.common import DtypeOption, JsonOption, VerboseOption, console, resolve_dtype, write_json
from a3_sglang.cli.output import steps, working
from a3_sglang.config import check_ratio, check_selector
from a3_sglang.explain.client import Client, ExplainError
from a3_sglang.explain.collect import Prompt, collect
from a3_sglang.explain.page import render, screenshot
from a3_sglang.local_server import StartError, local_server

T = TypeVar("T")


def explain(
    prompt: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Text file with the prompt.")],
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="HTML file to write.")],
    donor: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Text file with a prompt that is asked first; repeatable."),
    ] = None,
    question: Annotated[str | None, typer.Option(help="Added to the prompt after a blank line.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or Hub id; with --url that of its tokenizer.")] = None,
    url: Annotated[str | None, typer.Option(help="Use this server instead of starting one.")] = None,
    ratio: Annotated[str | None, typer.Option(help='Share of the reused tokens to recompute, or "auto".')] = None,
    selector: Annotated[str | None, typer.Option(help="Rule that selects them.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Continue fused KV of earlier prompts, and keep the prompt's own.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put every text into the model's chat template.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 48,
    top: Annotated[int, typer.Option(min=1, max=20, help="Likely tokens shown where the answers diverge.")] = 8,
    repeats: Annotated[int, typer.Option(min=0, help="Measured runs of each kind, besides the first.")] = 3,
    extra_key: Annotated[str | None, typer.Option(help="Namespace of the donors and the prompt.")] = None,
    png: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also save a picture of the page, drawn by Chromium.")
    ] = None,
    png_size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels of the picture.")] = "1280x1500",
    dtype: DtypeOption = "auto",
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Show on one HTML page which tokens of a prompt were reused, their origin, and the effect on time and answer.

    Without --url a server is started; the donors are asked first, then the prompt with a3 and with a full prefill.
    A server given with --url has to run with --a3-explain on. Its cache is not flushed: each full prefill is asked in
    a new namespace, and the prompt leaves no fused KV unless --keep is given.
    """
    options: dict[str, Any] = {"keep": keep}
    if ratio is not None:
        options["ratio"] = _checked("--ratio", lambda: check_ratio(_number(ratio)))
    if selector is not None:
        options["selector"] = _checked("--selector", lambda: check_selector(selector))
    size = _checked("--png-size", lambda: _size(png_size))
    if url is None and model is None:
        raise typer.BadParameter("is needed, unless --url names a server", param_hint="--model")
    try:
        with ExitStack() as stack:
            if url is None:
                assert model is not None
                url = stack.enter_context(_server(model, resolve_dtype(dtype)))
            client = Client(url)
            named = client.model()
            tokenizer = _tokenizer(model or named["tokenizer_path"])
            donors = [_prompt(tokenizer, path, None, chat) for path in donor or ()]
            with steps("asking", 2 + 2 * repeats + len(donors)) as step:
                explanation = collect(
                    client,
                    tokenizer,
                    Path(named["model_path"]).name,
                    _prompt(tokenizer, prompt, question, chat),
                    donors,
                    options,
                    tokens=tokens,
                    top=top,
                    repeats=repeats,
                    extra_key=extra_key,
                    step=step,
                )
        output.write_text(render(explanation), encoding="utf-8")
        write_json(json, asdict(explanation))
        if png is not None:
            screenshot(output, png, size)
    except (ExplainError, StartError) as error:
        raise SystemExit(f"error: {error}") from None
    console.print(" and ".join(str(path) for path in (output, png) if path is not None), soft_wrap=True)


@contextmanager
def _server(model: str, dtype: str) -> Iterator[str]:
    """A server that runs as long as the command."""
    arguments = ["--dtype", dtype, "--a3-explain", "on", "--a3-report", "exact"]
    with tempfile.TemporaryDirectory(prefix="a3-explain-") as folder, ExitStack() as stack:
        with working("starting a server"):
            url = stack.enter_context(local_server(model, Path(folder) / "log", *arguments))
        yield url


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ExplainError(f"no tokenizer in {model} (--model says where it is): {first}") from None


def _prompt(tokenizer: Any, path: Path, question: str | None, chat: bool) -> Prompt:
    """The prompt that is made of a file's text."""
    try:
        # Not read_text(), which would change line ends and so the tokens.
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ExplainError(f"{path} is not UTF-8 text: {error}") from None
    text = text if question is None else f"{text.rstrip()}\n\n{question}"
    if chat:
        messages = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(whole, add_special_tokens=False)
    else:
        ids = tokenizer.encode(text)
    if not ids:
        raise ExplainError(f"{path} is empty")
    return Prompt(path.name, text, ids)


def _number(text: str) -> Any:
    with suppress(ValueError):
        return float(text)
    return text


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError("must be WIDTHxHEIGHT in pixels, for example 1280x1500")
    return int(width), int(height)


def _checked(name: str, check: Callable[[], T]) -> T:
    try:
        return check()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=name) from None
