"""Files with a model of drift that was fitted to one language model, and the choice of one for a server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from a3_sglang.drift.fingerprint import fingerprint
from a3_sglang.drift.model import DEFAULT, Covariance, DriftModel

FORMAT: Literal[1] = 1
AUTO_NAME, DEFAULT_NAME = "auto", "default"
"""Values of ``--a3-drift`` that are not files."""
_AGAIN = "run a3-sglang calibrate again"


class DriftFile(BaseModel):
    """What ``a3-sglang calibrate`` writes, as JSON.

    One covariance serves all layers. A format with covariances for groups of layers would get the next number.

    Attributes:
        format: version of these fields.
        model: the language model's path or name when it was calibrated; for readers.
        fingerprint: of the language model, see :func:`a3_sglang.drift.fingerprint.fingerprint`.
        keys, values: the fitted covariances.
        measured: how and on what they were fitted; for readers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    model: str
    fingerprint: str = Field(min_length=1)
    keys: Covariance
    values: Covariance
    measured: dict[str, Any] = {}

    @property
    def drift(self) -> DriftModel:
        return DriftModel(self.keys, self.values)

    def write(self, path: Path) -> None:
        """Write the file; folders are created. It is complete when it appears."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> DriftFile:
        """Read a file.

        Raises:
            ValueError: one line that names the file and the field, and what to do.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; a3-sglang calibrate -o {path} writes it") from None
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            field = ".".join(map(str, problem["loc"]))
            if field == "format":
                raise ValueError(f"{path}: format: only {FORMAT} can be read; {_AGAIN}") from None
            message = problem["msg"].removeprefix("Value error, ")
            raise ValueError(f"{path}: {field or 'the file'}: {message}; {_AGAIN}") from None


def known_file(digest: str) -> Path:
    """Where the file of the model with this fingerprint is kept, and looked for."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return cache / "a3-sglang" / "drift" / f"{digest}.json"


def find_drift(option: str, model: str, revision: str | None = None) -> tuple[DriftModel, str]:
    """The model of drift for a server, and where it comes from.

    Args:
        option: ``--a3-drift``: "auto", "default" or a file.
        model: of the server: folder, file or Hub id.
        revision: of the Hub's repository.

    Raises:
        ValueError: the file cannot be used; one line that names it and what to do.
    """
    if option == DEFAULT_NAME:
        return DEFAULT, DEFAULT_NAME
    served = fingerprint(model, revision)
    if option != AUTO_NAME:
        path = Path(option).expanduser()
    elif served is None or not (path := known_file(served)).exists():
        return DEFAULT, DEFAULT_NAME
    found = DriftFile.read(path)
    if served is not None and found.fingerprint != served:
        raise ValueError(
            f"{path}: fingerprint: it was fitted to another model ({found.model}, {found.fingerprint}), not to this "
            f"({served}); run a3-sglang calibrate --model {model}, or give --a3-drift default"
        )
    return found.drift, str(path)
