"""The stand-ins that the CPU environment has instead of packages without a CPU build."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

support = pytest.importorskip("a3_cpu_support", reason="only the CPU environment has the stand-ins")
without_real_kernels = pytest.mark.skipif(
    importlib.machinery.PathFinder.find_spec("sgl_kernel") is not None, reason="the real sgl_kernel is installed"
)


def python(code: str, *, folder: Path, path: Path | None = None) -> str:
    """Run code in a fresh interpreter of this environment with ``folder`` on its path, like a plain start."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@without_real_kernels
def test_a_missing_kernel_can_be_looked_up_but_not_called() -> None:
    package = importlib.import_module("sgl_kernel")
    kernel = package.sampling.top_k.inner
    assert kernel is package.sampling.top_k.inner
    assert kernel != package.sampling.top_p.inner
    assert "sgl_kernel.sampling.top_k.inner" in repr(kernel)
    with pytest.raises(support.MissingKernelError, match=r"^sgl_kernel\.sampling\.top_k\.inner needs the sgl_kernel"):
        kernel(1, size=2)


@without_real_kernels
def test_a_missing_kernel_of_a_submodule_cannot_be_called_either() -> None:
    submodule = importlib.import_module("sgl_kernel.deep.flash_attn")
    with pytest.raises(support.MissingKernelError, match=r"sgl_kernel\.deep\.flash_attn\.attend"):
        submodule.attend()


@without_real_kernels
@pytest.mark.parametrize("name", ["__version__", "__all__", "__wrapped__"])
def test_special_names_do_not_exist(name: str) -> None:
    package = importlib.import_module("sgl_kernel")
    assert not hasattr(package, name)
    assert not hasattr(package.kernel, name)


def test_other_missing_packages_stay_missing() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sgl_kernel_of_another_name")


def test_installing_again_changes_nothing() -> None:
    before = list(sys.meta_path)
    support.install()
    assert sys.meta_path == before


def test_the_real_package_wins(tmp_path: Path) -> None:
    package = tmp_path / "sgl_kernel"
    package.mkdir()
    (package / "__init__.py").write_text("def kernel():\n    return 'real'\n")
    (package / "part.py").write_text("WHO = 'real part'\n")
    code = """
import sgl_kernel, sgl_kernel.part
print(sgl_kernel.kernel(), sgl_kernel.part.WHO, hasattr(sgl_kernel, "other"))
try:
    import sgl_kernel.absent
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert python(code, folder=tmp_path, path=tmp_path).splitlines() == ["real real part False", "sgl_kernel.absent"]


def test_the_stand_ins_are_there_from_the_start_and_import_nothing_large(tmp_path: Path) -> None:
    code = "import sys; print([name in sys.modules for name in ('a3_cpu_support', 'torch', 'torchvision')])"
    assert python(code, folder=tmp_path) == "[True, False, False]"


def test_torchvision_can_be_imported_but_has_no_kernels(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    code = """
import torch, torchvision, torchvision.transforms.v2
from torchvision.extension import _has_ops
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
try:
    kept = torch.ops.torchvision.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
except NotImplementedError:
    kept = "no kernel"
print(kept == ([0, 2] if _has_ops() else "no kernel"))
"""
    assert python(code, folder=tmp_path) == "True"


def test_the_kernels_folder_is_not_a_top_level_package() -> None:
    """Other packages probe for a package named ``kernels``; they must not find this one if started in the clone."""
    code = """
try:
    import kernels
except ModuleNotFoundError:
    print("absent")
else:
    print(getattr(kernels, "__file__", None), hasattr(kernels, "row_attention"))
"""
    shown = python(code, folder=ROOT)
    assert shown == "absent" or (shown.endswith(" False") and not shown.startswith(str(ROOT)))


def test_the_kernels_folder_is_a_subpackage() -> None:
    module = importlib.import_module("a3_sglang.kernels.row_attention")
    assert callable(module.row_attention)
