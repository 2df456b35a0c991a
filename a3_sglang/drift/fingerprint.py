"""Recognizes a language model by what its files contain, wherever they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

_DESCRIPTIVE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of config.json that say nothing about what the model computes."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
"""Suffixes of files with weights. Only files of the first suffix that a folder has count, as others may be copies."""
_SAMPLES, _SAMPLE = 16, 4096
"""Number of samples of a file, and bytes of each."""


def fingerprint(model: str, revision: str | None = None) -> str | None:
    """Hash of a model's configuration and of samples of its weights, 16 hexadecimal digits.

    Equal for copies of a model in different folders, different for models with other weights.

    Args:
        model: folder, file, or Hub id of a model that was downloaded.
        revision: of the Hub's repository.

    Returns:
        None if the files are not on this machine.
    """
    place = _place(model, revision)
    if place is None:
        return None
    digest = hashlib.sha256()
    config = place / "config.json"
    if config.is_file():
        described = json.loads(config.read_text(encoding="utf-8"))
        kept = {key: value for key, value in described.items() if key not in _DESCRIPTIVE}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    for file in _weights(place):
        size = file.stat().st_size
        digest.update(f" {size} ".encode())
        with file.open("rb") as opened:
            for i in range(_SAMPLES):
                opened.seek(max(0, size - _SAMPLE) * i // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _place(model: str, revision: str | None) -> Path | None:
    """Where the model's files are; None if they are not on this machine."""
    if Path(model).exists():
        return Path(model)
    # Comes with transformers; imported here, as a model is usually a folder.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _weights(place: Path) -> list[Path]:
    """Files with weights, in the order of their names."""
    if place.is_file():
        return [place]
    by_suffix = (sorted(place.glob(f"*{suffix}")) for suffix in _WEIGHTS)
    return next((files for files in by_suffix if files), [])
