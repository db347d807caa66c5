"""Builds that several tests of the plugins share: each is made once in a test run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.plugins import Host, build_emulated, built_once


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of libkernels.so, libplugins.so and libhost.so, all for the CPU."""
    return built_once(tmp_path_factory, "emulated-plugins", build_emulated)


@pytest.fixture(scope="session")
def host(emulated: Path) -> Host:
    """The C++ host with the plugins on emulated kernels."""
    return Host(emulated / "libhost.so", emulated / "libplugins.so")
