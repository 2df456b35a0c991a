"""``a3-sglang doctor``: checks an installation."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from a3_sglang.attention.registry import ROW_ATTENTION_NAMES
from a3_sglang.cli.common import JsonOption, VerboseOption, print_table, write_json


class Check(NamedTuple):
    """One row of the table."""

    name: str
    ok: bool
    found: str


def doctor(
    server: Annotated[
        list[str] | None,
        typer.Argument(help="Options of the server after --, to check whether they are refused: -- --enable-lora"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Also check whether this model can be served.")] = None,
    verbose: VerboseOption = False,
    json: JsonOption = None,
) -> None:
    """Check versions, the plugin, what a3 needs of SGLang, the device and, with --model, model and server options.

    The exit status is 1 if something is wrong.
    """
    if server and model is None:
        raise typer.BadParameter("options of the server need --model", param_hint="SERVER")
    checks = [_sglang(), _torch(), _plugin(), _device()]
    if checks[0].ok:
        checks.append(_sglang_names())
        if model is not None:
            checks += [*_model(model), _server(model, server or [])]
    print_table("a3-sglang doctor", ("check", "", "found"), [(n, "ok" if ok else "WRONG", t) for n, ok, t in checks])
    write_json(json, [check._asdict() for check in checks])
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sglang() -> Check:
    found = _version("sglang")
    if found is None:
        return Check("sglang", False, 'not installed; pip install "a3-sglang[cuda]"')
    from a3_sglang.integration.compat import SUPPORTED

    tested = ", ".join(SUPPORTED)
    return Check("sglang", True, found if found in SUPPORTED else f"{found}, not tested (tested: {tested})")


def _torch() -> Check:
    found = _version("torch")
    return Check("torch", found is not None, f"{found or 'not installed'}, Python {platform.python_version()}")


def _plugin() -> Check:
    found = [e.value for e in entry_points(group="sglang.srt.plugins") if e.name == "a3"]
    return Check("plugin entry point", found == ["a3_sglang.plugin:register"], ", ".join(found) or "missing")


def _sglang_names() -> Check:
    try:
        from a3_sglang.integration import compat

        compat.check()
    except Exception as error:
        return Check("SGLang's seams", False, str(error))
    return Check("SGLang's seams", True, "all there")


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(ROW_ATTENTION_NAMES)
        return Check("device", True, f"{torch.cuda.get_device_name()}, rows attend by the fastest of {names} at start")
    from a3_sglang.cpu import serving_dtype

    dtype, reason = serving_dtype()
    return Check("device", True, f"CPU, {dtype} ({reason}), rows attend by PyTorch")


def _model(model: str) -> list[Check]:
    from a3_sglang.integration.support import model_refusal, rope_types

    name = f"model {Path(model).name}"
    try:
        from a3_sglang.integration.diagnosis import load_model_config

        config = load_model_config(model)
        reason = model_refusal(config)
    except Exception as error:
        return [Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0])]
    if reason is not None:
        return [Check(name, False, f"{reason}; --a3-mode observe reports what could be reused")]
    text = getattr(config, "hf_text_config", None) or config.hf_config
    heads, dim = config.get_total_num_kv_heads(), config.head_dim
    size = 2 * config.num_hidden_layers * heads * dim * config.dtype.itemsize
    return [
        Check(name, True, f"{', '.join(config.hf_config.architectures)}: supported"),
        Check("RoPE", True, f"{', '.join(sorted(rope_types(text)))}, checked against the keys at start"),
        Check(
            "KV", True, f"{config.num_hidden_layers} layers, {heads} heads of {dim}: {size / 1024:.1f} KiB per token"
        ),
    ]


def _server(model: str, given: list[str]) -> Check:
    """Whether SGLang and a3 accept these options with this model."""
    import torch

    from a3_sglang.launch_server import arguments

    try:
        from a3_sglang.integration.diagnosis import arguments_refusal

        reason = arguments_refusal(arguments(["--model-path", model, *given], torch.cuda.is_available()))
    except SystemExit:
        reason = "SGLang does not take these options; it says why above"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return Check("server options", reason is None, reason or " ".join(given) or "the defaults")
