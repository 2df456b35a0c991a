"""Stand-ins that let the real SGLang engine start on a CPU without AMX.

Two packages that SGLang imports have no CPU build in the registry:

* ``sgl_kernel``: imported by name in modules that the plain Llama path never calls on a CPU. The
  stand-in hands out objects that raise when called, so nothing can silently compute a wrong result.
* ``torchvision``: its Python part works once the schemas of two operators are declared.

Nothing happens where the real ones exist. A ``.pth`` file imports this module at interpreter start, so the
processes that SGLang spawns have the stand-ins too. Importing it adds two entries to ``sys.meta_path`` and nothing
more: torch is imported no earlier than torchvision.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

__all__ = ["MissingKernelError", "install"]

_NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_TORCHVISION_OPS = ("nms", "qnms")


class MissingKernelError(RuntimeError):
    """A kernel of ``sgl_kernel`` was called on a machine that does not have the package."""


class _Missing:
    """A name of ``sgl_kernel``: may be looked up, compared and passed on, but not called."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        # Kept, so that the same name is the same object however often it is looked up.
        found = self.__dict__[name] = _Missing(f"{self.__name__}.{name}")
        return found

    def __repr__(self) -> str:
        return f"<stand-in for {self.__name__}>"

    def __call__(self, *_args: object, **_kwargs: object) -> Any:
        raise MissingKernelError(
            f"{self.__name__} needs the sgl_kernel package, which is not installed on this machine"
        )


class _StandInLoader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            found = module.__dict__[name] = _Missing(f"{spec.name}.{name}")
            return found

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def _is_stand_in(module: types.ModuleType | None) -> bool:
    """Whether a module is one of these, so that a real package is not given the submodules that it lacks."""
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _StandInLoader)


class _StandIns(importlib.abc.MetaPathFinder):
    """Last finder of all, so it is reached only when no real ``sgl_kernel`` was found."""

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, submodule = fullname.partition(".")
        if package != "sgl_kernel" or (submodule and not _is_stand_in(sys.modules.get(package))):
            return None
        return importlib.machinery.ModuleSpec(fullname, _StandInLoader(), is_package=True)


class _TorchvisionOps(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators just before its first import, then steps aside."""

    def __init__(self) -> None:
        self._library: Any = None

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torchvision" and self._library is None:
            self._library = _declare_torchvision_ops()


def _declare_torchvision_ops() -> Any:
    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or _compiled_ops_load(spec):
        return False
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in _TORCHVISION_OPS:
        library.define(name + _NMS_SCHEMA)
    return library


def _compiled_ops_load(spec: importlib.machinery.ModuleSpec) -> bool:
    """Whether torchvision's own extension belongs to the installed torch (a CUDA build needs a CUDA torch)."""
    import torch

    found = importlib.machinery.PathFinder.find_spec("_C", list(spec.submodule_search_locations or []))
    if found is None or found.origin is None:
        return False
    try:
        torch.ops.load_library(found.origin)
    except (OSError, RuntimeError):
        return False
    return True


def install() -> None:
    """Put the two finders in place; calling it again changes nothing."""
    if not any(isinstance(finder, _StandIns) for finder in sys.meta_path):
        sys.meta_path.append(_StandIns())
        sys.meta_path.insert(0, _TorchvisionOps())


install()
