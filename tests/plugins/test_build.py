"""`zreward plugins`: a real build by nvcc, what is in it, and every way in which it is refused."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import Cli
from tests.support.plugins import SOURCES, Host, built_once, tensorrt_include
from zreward import plugins
from zreward.commands import plugins as commands
from zreward.errors import PluginError, UsageError
from zreward.export.plugins import toolchain
from zreward.export.plugins.build import _telling, build_plugins
from zreward.hashing import file_sha256
from zreward.plugins import (
    LIBRARY_FILE,
    LOCATION,
    NAMESPACE,
    OPERATORS,
    VERSION,
    PluginLibrary,
    PluginRecord,
    default_folder,
    find_library,
    record_path,
    write_record,
)

pytestmark = pytest.mark.slow

ARCHITECTURES = (80, 90, 120)


def build(folder: Path) -> None:
    """By the compiler of pip's wheels, with every warning an error."""
    build_plugins(
        folder,
        nvcc=toolchain.wheel_nvcc(),
        tensorrt=tensorrt_include(),
        architectures=ARCHITECTURES,
        warnings_are_errors=True,
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> PluginLibrary:
    if sys.platform != "linux":
        pytest.skip("the wheels of nvcc are for Linux")
    return PluginLibrary.open(built_once(tmp_path_factory, "real-plugins", build) / LIBRARY_FILE)


@pytest.fixture
def altered(library: PluginLibrary, tmp_path: Path) -> Path:
    """A copy with its record, for changing."""
    copy = tmp_path / LIBRARY_FILE
    shutil.copyfile(library.path, copy)
    shutil.copyfile(record_path(library.path), record_path(copy))
    return copy


# The library that nvcc makes


def device_codes(library: Path) -> set[tuple[str, int]]:
    """What the fat binaries hold: ("ptx" or "machine", compute capability times ten).

    A fat binary begins with the magic number 0xba55ed50, a version, the size of its header and that of its contents;
    an entry with its kind, version, header size and size, and its architecture at byte 28.
    """
    data, found, at = library.read_bytes(), set(), 0
    while (at := data.find(struct.pack("<I", 0xBA55ED50), at)) >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            found.add(({1: "ptx", 2: "machine"}[kind], architecture))
            entry += entry_header + entry_size
        at = end
    return found


def test_it_holds_code_for_every_architecture(library: PluginLibrary) -> None:
    expected = {("machine", architecture) for architecture in ARCHITECTURES} | {("ptx", 80)}
    assert device_codes(library.path) == expected


def test_the_record_says_what_was_built(library: PluginLibrary) -> None:
    record = library.record
    assert record.sha256 == file_sha256(library.path)
    assert record.bytes == library.path.stat().st_size
    assert record.plugins == OPERATORS
    assert record.architectures == ("8.0", "9.0", "12.0")
    wheel = toolchain.wheel_nvcc()
    assert wheel is not None and record.cuda == toolchain.nvcc_version(wheel)
    library.check_contents()


def test_a_host_makes_every_plugin_of_it(library: PluginLibrary, emulated: Path) -> None:
    """The library as users get it, on a machine without a GPU: nothing of CUDA runs before a kernel does."""
    host = Host(emulated / "libhost.so", library.path)
    assert [creator.name for creator in host.creators] == list(OPERATORS)
    rule = host.create(
        "GatedDeltaRule",
        [("key_heads", 5, 2), ("value_heads", 5, 4), ("scale", 1, 0.1), ("key_epsilon", 1, 0)],
    )
    again = host.create("GatedDeltaRule", rule.serialize(), phase=1)
    assert again.serialize() == rule.serialize()
    assert again.output_shapes([(1, 3, 288), (1, 3, 4), (1, 3, 4), (1, 4, 32, 40)])[0] == ["1", "3", "160"]


def test_check_on_the_command_line(library: PluginLibrary, cli: Cli) -> None:
    result = cli("plugins", "check", library.path, "--json")
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["path"] == str(library.path)
    assert (
        PluginRecord(
            **{
                k: tuple(v) if isinstance(v, list) else v
                for k, v in shown.items()
                if k in asdict(library.record)
            }
        )
        == library.record
    )
    result = cli("plugins", "check", library.path)
    assert "RubricExpectation, CausalConv1d, GatedDeltaRule" in result.stdout
    assert "compute capability 8.0, 9.0, 12.0" in result.stdout


# What is refused before it runs


def test_an_altered_library_is_not_opened(altered: Path, cli: Cli) -> None:
    data = bytearray(altered.read_bytes())
    data[len(data) // 2] ^= 1
    altered.write_bytes(data)
    with pytest.raises(PluginError, match="this library was altered after it was built"):
        PluginLibrary.open(altered)
    result = cli("plugins", "check", altered)
    assert result.returncode == 1
    assert "was altered after it was built" in result.stderr and "Traceback" not in result.stderr


def test_a_library_without_its_record_is_not_opened(altered: Path) -> None:
    record_path(altered).unlink()
    with pytest.raises(PluginError, match="the record of the library is missing"):
        PluginLibrary.open(altered)


def test_a_missing_library_names_the_command_that_makes_one(tmp_path: Path, cli: Cli) -> None:
    with pytest.raises(PluginError, match="zreward plugins build"):
        PluginLibrary.open(tmp_path / LIBRARY_FILE)
    assert cli("plugins", "check", tmp_path / LIBRARY_FILE).returncode == 1


def test_another_library_than_the_engines_is_refused(altered: Path) -> None:
    assert PluginLibrary.open(altered, sha256=file_sha256(altered)).path == altered
    with pytest.raises(PluginError, match="the engine was built with another plugin library"):
        PluginLibrary.open(altered, sha256="0" * 64)


def test_a_file_that_is_no_library_of_ours_is_refused(tmp_path: Path) -> None:
    other = tmp_path / LIBRARY_FILE
    other.write_bytes(b"no library")
    record = PluginRecord(file_sha256(other), 10, "0", 1, "13.0", ("8.0",), "11.0.0", OPERATORS)
    write_record(other, record)
    with pytest.raises(PluginError, match="this is no library of zreward's kernels"):
        PluginLibrary.open(other).check_contents()


def test_a_record_that_claims_something_else_is_noticed(altered: Path) -> None:
    record = PluginLibrary.open(altered).record
    write_record(altered, PluginRecord(**{**asdict(record), "tensorrt": "9.0.0"}))
    with pytest.raises(PluginError, match=r"the library says it is .*, its record says .*9.0.0"):
        PluginLibrary.open(altered).check_contents()


class Registry:
    """What a plugin registry of TensorRT's Python module offers, as far as loading needs it."""

    def __init__(self, found: tuple[str, ...]) -> None:
        self.found = found
        self.loaded: list[str] = []

    def load_library(self, path: str) -> object:
        self.loaded.append(path)
        return object()

    def get_creator(self, name: str, version: str, namespace: str) -> str | None:
        return (
            name
            if self.loaded and name in self.found and (version, namespace) == (VERSION, NAMESPACE)
            else None
        )


def module(registry: Registry, version: str, name: str) -> Any:
    network = SimpleNamespace(add_plugin_v3=None)
    return SimpleNamespace(
        __name__=name, __version__=version, get_plugin_registry=lambda: registry, INetworkDefinition=network
    )


def test_it_is_loaded_into_a_registry_once(library: PluginLibrary) -> None:
    registry = Registry(OPERATORS)
    tensorrt = module(
        registry, f"{str(library.record.tensorrt).split('.')[0]}.4.0.1", "tensorrt_of_this_test"
    )
    assert library.load(tensorrt) is library.load(tensorrt)
    assert registry.loaded == [str(library.path)]
    of_a_builder = Registry(OPERATORS)
    library.load(tensorrt, of_a_builder)
    assert of_a_builder.loaded == [str(library.path)]


def test_another_major_version_is_not_loaded(library: PluginLibrary) -> None:
    """The binary layout of the interfaces differs: a call through it would end the process."""
    registry = Registry(OPERATORS)
    with pytest.raises(PluginError, match=r"built for TensorRT .*, but TensorRT 7.2.3 is installed"):
        library.load(module(registry, "7.2.3", "tensorrt"))
    assert registry.loaded == []


def test_a_tensorrt_without_plugins_is_refused(library: PluginLibrary) -> None:
    """TensorRT-RTX: its registry would take the library, and its parser would end the process."""
    registry = Registry(OPERATORS)
    rtx = module(registry, "1.7.1.116", "tensorrt_rtx")
    rtx.INetworkDefinition = SimpleNamespace()
    with pytest.raises(
        PluginError, match=r"tensorrt_rtx 1.7.1.116 has no plugins in its networks; go without"
    ):
        library.load(rtx)
    assert registry.loaded == []


def test_a_registry_that_takes_only_some_is_an_error(library: PluginLibrary) -> None:
    registry = Registry(OPERATORS[:2])
    with pytest.raises(PluginError, match=r"does not take this library .no plugin for GatedDeltaRule"):
        library.load(module(registry, str(library.record.tensorrt), "tensorrt_that_refuses"))


def test_where_the_library_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(LOCATION, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_library() is None
    default_folder().mkdir(parents=True)
    (default_folder() / LIBRARY_FILE).touch()
    assert find_library() == tmp_path / "zreward" / "plugins" / LIBRARY_FILE
    monkeypatch.setenv(LOCATION, "/somewhere/else.so")
    assert find_library() == Path("/somewhere/else.so")


def test_what_counts_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"tensorrt_cu13_bindings": "11.4.0.106"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    assert plugins.installed_tensorrt() is None, "bindings without a library"
    versions["tensorrt_cu13_libs"] = "11.4.0.106"
    assert plugins.installed_tensorrt() == "11.4.0.106"


def test_check_compares_with_the_tensorrt_that_is_installed(
    library: PluginLibrary, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plugins, "installed_tensorrt", lambda: "7.2.3")
    with pytest.raises(PluginError, match=r"but TensorRT 7\.2\.3 is installed"):
        commands.check(library.path)
    monkeypatch.setattr(plugins, "installed_tensorrt", lambda: library.record.tensorrt)
    commands.check(library.path)
    assert f"{library.record.tensorrt} is installed" in capsys.readouterr().out


# What is refused before it is built


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(folder: Path, version: str = "13.0.88") -> Path:
    return script(folder / "nvcc", f"echo 'Cuda compilation tools, release 13.0, V{version}'")


def empty_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wheels, no toolkit in its usual place, no headers among the system's."""
    monkeypatch.setattr(toolchain, "wheel_nvcc", lambda: None)
    monkeypatch.setattr(toolchain, "_USUAL_NVCC", Path("/nonexistent/nvcc"))
    monkeypatch.setattr(toolchain, "_HEADER_FOLDERS", ("/nonexistent",))
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nonexistent")


def test_tools_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty_machine(monkeypatch)
    environment: dict[str, str] = {"PATH": str(tmp_path)}

    def find() -> toolchain.Toolchain:
        return toolchain.find_toolchain(environment=environment)

    with pytest.raises(PluginError, match=r"nvcc was not found .*zreward\[plugins\]"):
        find()
    nvcc = fake_nvcc(tmp_path)
    with pytest.raises(PluginError, match="CMake was not found"):
        find()
    script(tmp_path / "cmake", "true")
    with pytest.raises(PluginError, match="no C\\+\\+ compiler was found"):
        find()
    script(tmp_path / "c++", "true")
    with pytest.raises(PluginError, match=r"TensorRT's C\+\+ headers \(NvInferRuntime\.h\) were not found"):
        find()
    environment["TENSORRT_ROOT"] = str(tmp_path)
    with pytest.raises(
        PluginError, match=r"which TENSORRT_ROOT names, nor its include/ has NvInferRuntime.h"
    ):
        find()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInferRuntime.h").touch()
    assert find() == toolchain.Toolchain(
        nvcc, "13.0.88", tmp_path / "cmake", (tmp_path / "include").resolve()
    )


def test_where_nvcc_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is named comes first, then PATH, then the wheels."""
    for name in ("named", "home/bin", "path", "wheel"):
        (tmp_path / name).mkdir(parents=True)
        fake_nvcc(tmp_path / name)
    monkeypatch.setattr(toolchain, "wheel_nvcc", lambda: tmp_path / "wheel" / "nvcc")
    environment = {
        "CUDACXX": str(tmp_path / "named" / "nvcc"),
        "CUDA_HOME": str(tmp_path / "home"),
        "PATH": str(tmp_path / "path"),
    }
    for name, variable in (("named", "CUDACXX"), ("home/bin", "CUDA_HOME"), ("path", "PATH")):
        assert toolchain.find_nvcc(None, environment) == tmp_path / name / "nvcc"
        environment[variable] = ""
    assert toolchain.find_nvcc(None, environment) == tmp_path / "wheel" / "nvcc"
    with pytest.raises(PluginError, match="there is no nvcc here, which --nvcc names"):
        toolchain.find_nvcc(tmp_path / "missing", environment)


def test_an_old_nvcc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"nvcc 12.4.131 is too old"):
        toolchain.find_toolchain(nvcc=fake_nvcc(tmp_path, "12.4.131"), kernels_only=True)


def test_an_nvcc_that_does_not_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="this nvcc does not run"):
        toolchain.nvcc_version(script(tmp_path / "nvcc", "exit 3"))
    with pytest.raises(PluginError, match="names no version"):
        toolchain.nvcc_version(script(tmp_path / "nvcc", "echo hello"))


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    """The message ends with what it said, and nothing is left in the output folder."""
    root = tmp_path / "toolkit"
    (root / "bin").mkdir(parents=True)
    (root / "include").mkdir()
    (root / "lib64").mkdir()
    (root / "include" / "cuda_runtime_api.h").write_text(
        "#pragma once\nenum cudaError_t { cudaSuccess };\n"
        'inline const char* cudaGetErrorString(cudaError_t) { return ""; }\n'
    )
    (root / "lib64" / "libcudart_static.a").touch()
    nvcc = script(
        root / "bin" / "nvcc",
        'case "$1" in --version) echo V13.0.1;; *) echo "kernel.cu(7): error: a planted mistake"; exit 2;; esac',
    )
    with pytest.raises(PluginError, match=r"the plugins could not be built(.|\n)*a planted mistake"):
        build_plugins(tmp_path / "out", nvcc=nvcc, kernels_only=True)
    assert not (tmp_path / "out").exists()


def test_what_a_failed_build_says() -> None:
    """From the first error on, or the end where nothing is called one."""
    fine = [f"[ {i}%] Building" for i in range(50)]
    after = [f"note {i}" for i in range(50)]
    assert _telling("\n".join([*fine, "a.cu(7): error: planted", *after])) == [
        "a.cu(7): error: planted",
        *after[:29],
    ]
    assert _telling("\n".join(fine)) == fine[-30:]
    assert _telling("one line\n\n") == ["one line"]


def test_calls_that_cannot_be_carried_out(tmp_path: Path, cli: Cli) -> None:
    with pytest.raises(UsageError, match=r"the kernels need compute capability 8.0"):
        build_plugins(tmp_path, architectures=(75, 90))
    with pytest.raises(UsageError, match=r"the kernels need compute capability 8.0"):
        build_plugins(tmp_path, architectures=())
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file; name the folder"):
        build_plugins(tmp_path / "file")
    result = cli("plugins", "build", "-o", tmp_path / "new", "--architectures", "8.x")
    assert result.returncode == 2
    assert "expected compute capabilities with commas between them" in result.stderr
    result = cli("plugins", "build", "-o", tmp_path / "new", "--nvcc", tmp_path / "nvcc")
    assert result.returncode == 1
    assert "there is no nvcc here, which --nvcc names" in result.stderr


def test_every_source_is_in_the_package() -> None:
    """An installed zreward builds the plugins too: patterns of package-data, read as setuptools does."""
    import tomllib

    pyproject = tomllib.loads((SOURCES.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = pyproject["tool"]["setuptools"]["package-data"]["zreward.export.plugins"]
    shipped = {path for pattern in patterns for path in SOURCES.glob(pattern)}
    needed = {p for p in SOURCES.rglob("*") if p.suffix in (".cu", ".cpp", ".h", ".txt")}
    assert needed <= shipped
