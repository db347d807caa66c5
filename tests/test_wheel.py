"""The wheel, built from a clean copy and installed elsewhere: everything is in it, and it scores."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from zreward.runtime import kernels

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]
PLUGIN_SOURCES = "export/plugins/"

pytestmark = pytest.mark.slow


def source_files() -> list[str]:
    """What a clone would hold: tracked files and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def wheel_name(source: str) -> str | None:
    """Where a source file belongs in the wheel; None for files that do not ship."""
    for package, folder in FOLDERS.items():
        if source.startswith(f"{folder}/") and source.endswith(".py"):
            return f"{package.replace('.', '/')}/{source.removeprefix(folder + '/')}"
    if source.startswith(PLUGIN_SOURCES):  # which `zreward plugins build` compiles
        return f"zreward/{source}"
    return source if source.startswith("zreward/") else None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools would take deleted modules from an old build/ folder."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in source_files():
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist")]
    subprocess.run([*command, str(folder / "source")], check=True, capture_output=True)
    return next((folder / "dist").glob("zreward-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder that the wheel is installed in, far from the checkout."""
    target = wheel.parent.parent / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, str(target), str(wheel)], check=True)
    return target


def run_installed(installed: Path, code: str, cwd: Path) -> str:
    """Run `code` with the installed zreward and the libraries of this environment.

    -S leaves out the .pth files, and with them the editable install of the checkout; -I leaves out the
    working directory and PYTHONPATH.
    """
    paths = [str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path += {paths!r}\n{code}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_module_and_asset_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    expected = {name for source in source_files() if (name := wheel_name(source))}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    compiled = {name for name in found if name.startswith("zreward/runtime/kernels/_library.")}
    assert found - compiled == expected
    assert bool(compiled) == (kernels.compiled_library() is not None)
    packages = {f"{package.replace('.', '/')}/__init__.py" for package in SETUPTOOLS["packages"]}
    assert packages <= found
    assert "zreward/py.typed" in found
    student = "zreward/assets/reference-student"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "contract.json"):
        assert f"{student}/{name}" in found


def test_the_command_is_installed(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "zreward = zreward.cli:main" in archive.read(entry_points).decode()


def test_the_installed_package_scores(installed: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    code = f"""
import json, zreward, zreward.runtime.scorer
from zreward.runtime import Scorer
with Scorer.open({str(tiny_bundle)!r}) as scorer:
    score = scorer.score(prompt="a red wall", images=["red.png"])[0]
print(json.dumps([zreward.__file__, zreward.runtime.scorer.__file__, score.overall]))
"""
    package, scorer, overall = json.loads(run_installed(installed, code, tmp_path))
    assert Path(package).is_relative_to(installed)
    assert Path(scorer).is_relative_to(installed)
    assert 1 <= overall <= 5


def test_the_installed_command_exports_the_student_that_ships(installed: Path, tmp_path: Path) -> None:
    code = """
from zreward.commands.demo import REFERENCE_STUDENT
sys.argv = ["zreward", "export", str(REFERENCE_STUDENT), "-o", "bundle", "--no-parity"]
from zreward.cli import main
main()
"""
    assert "bundle" in run_installed(installed, code, tmp_path)
    code = """
sys.argv = ["zreward", "verify", "bundle"]
from zreward.cli import main
main()
"""
    assert "golden" in run_installed(installed, code, tmp_path)
