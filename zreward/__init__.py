"""zreward: train, quantize, export and run visual reward models.

The folders ``export``, ``quant``, ``runtime`` and ``training`` at the top of the repository are the
packages ``zreward.export`` and so on (see ``[tool.setuptools]`` in pyproject.toml). In a checkout this
folder shadows an installed copy, so the checkout's root is put on the package path here.
"""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "runtime").is_dir():
    __path__.append(str(_ROOT))
