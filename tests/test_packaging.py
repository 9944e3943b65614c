"""What an installation holds, and that importing it needs neither a GPU nor the optional packages."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "lowrank_ops", "kernels"]
OPTIONAL = ["triton", "transformers", "peft", "matplotlib", "tqdm", "gguf"]


def run_python(code: str, cwd: Path, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "sources").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "sources" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", folder, folder / "sources"], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was unpacked to, which is all that installing it does."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def shipped(folder: str, pattern: str, name: str) -> set[str]:
    return {f"{name}/{path.relative_to(ROOT / folder).as_posix()}" for path in (ROOT / folder).rglob(pattern)}


def test_the_wheel_holds_every_module_and_table_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == (
        shipped("lowrank_ops", "*.py", "lowrank_ops")
        | shipped("kernels", "*.py", "lowrank_ops/kernels")
        | shipped("kernels", "*.json", "lowrank_ops/kernels")
        | shipped("lowrank_ops", "py.typed", "lowrank_ops")
    )


def test_the_wheel_carries_the_license_and_runs_anywhere(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (license_file,) = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_installed_kernels_live_inside_the_package(installed):
    pytest.importorskip("triton")
    code = "import lowrank_ops.kernels as k; print(k.__name__, k.__file__)"
    name, path = run_python(code, cwd=installed, PYTHONPATH=str(installed)).split()
    assert name == "lowrank_ops.kernels"
    assert Path(path) == installed / "lowrank_ops" / "kernels" / "__init__.py"


def test_the_install_claims_no_top_level_name_but_its_own(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"lowrank_ops"}


def test_the_editable_install_finds_kernels_too(tmp_path):
    pytest.importorskip("triton")
    code = "import lowrank_ops.kernels as k; print(k.__file__)"
    assert Path(run_python(code, cwd=tmp_path).strip()) == ROOT / "kernels" / "__init__.py"


# a module that is None in sys.modules raises ImportError when it is imported
WITHOUT_OPTIONAL = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
import torch
import lowrank_ops as lo
x, w, a, b = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
print(lo.lora_linear(x, w, a, b, scale=0.5).sum().item())
"""


def test_everything_runs_without_a_gpu_and_without_optional_packages(tmp_path):
    assert run_python(WITHOUT_OPTIONAL, cwd=tmp_path, CUDA_VISIBLE_DEVICES="").strip() == "36.0"


def test_importing_loads_no_optional_package(tmp_path):
    code = f"""
import sys, torch
before = set(sys.modules)
import lowrank_ops
print(*[name for name in set(sys.modules) - before if name.split(".")[0] in {OPTIONAL}])
"""
    assert run_python(code, cwd=tmp_path).strip() == ""


def test_importing_prints_nothing_and_warns_of_nothing(tmp_path):
    code = "import torch, warnings; warnings.simplefilter('error'); import lowrank_ops"
    assert run_python(code, cwd=tmp_path) == ""


def test_every_public_name_exists(tmp_path):
    code = "import lowrank_ops as lo; print(*[name for name in lo.__all__ if not hasattr(lo, name)])"
    assert run_python(code, cwd=tmp_path).strip() == ""


def test_kernels_without_triton_are_an_error_that_says_what_to_do(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import torch
import lowrank_ops as lo
t = torch.ones(2, 2)
try:
    lo.lora_linear(t, t, t, t, impl="triton")
except RuntimeError as error:
    print(error)
"""
    assert "pip install triton" in run_python(code, cwd=tmp_path)
