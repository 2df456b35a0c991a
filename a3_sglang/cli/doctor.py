"""``a3-sglang doctor``: is everything in place?"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Annotated

import typer

from a3_sglang.cli.common import JsonOption, VerboseOption, print_table, write_json


def doctor(
    model: Annotated[str | None, typer.Option(help="Also check whether this model can be served.")] = None,
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Check versions, the plugin, SGLang's seams and, with --model, the model. Exit status 1 where one is wrong."""
    checks: list[tuple[str, bool, str]] = [_version(name) for name in ("sglang", "torch")]
    found = [e.value for e in entry_points(group="sglang.srt.plugins") if e.name == "a3"]
    checks.append(("plugin entry point", found == ["a3_sglang.plugin:register"], ", ".join(found) or "missing"))
    checks.append(_seams())
    if model is not None:
        checks.append(_model(model))
    print_table("a3-sglang doctor", ("check", "", "found"), [(n, "ok" if ok else "WRONG", t) for n, ok, t in checks])
    write_json(json, [{"check": n, "ok": ok, "found": t} for n, ok, t in checks])
    if not all(ok for _, ok, _ in checks):
        raise typer.Exit(1)


def _version(name: str) -> tuple[str, bool, str]:
    try:
        return name, True, version(name) + (f", Python {platform.python_version()}" if name == "torch" else "")
    except PackageNotFoundError:
        return name, False, "not installed"


def _seams() -> tuple[str, bool, str]:
    try:
        from a3_sglang import seams

        seams.check()
    except Exception as error:
        return "SGLang's seams", False, str(error)
    return "SGLang's seams", True, "all there"


def _model(model: str) -> tuple[str, bool, str]:
    from a3_sglang.server.support import model_refusal

    try:
        from sglang.srt.configs.model_config import ModelConfig

        reason = model_refusal(ModelConfig(model_path=model))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"model {Path(model).name}", reason is None, reason or "supported"
