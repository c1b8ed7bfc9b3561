"""The public PyTorch libraries that parity tests compare with: the extra `parity`, or a skip."""

import importlib
import importlib.util
import sys
import types
from typing import Any
from unittest import mock

import pytest


def peer(name: str) -> Any:
    """Imports a peer's module, or skips the test module where it is not installed.

    k-diffusion's `__init__` imports training code that needs a dozen packages more; its samplers
    need none of them, so the package is entered without it, and without torchvision.
    """
    package = name.partition(".")[0]
    reason = f"{package} is not installed: the extra `parity`"
    if package != "k_diffusion":
        return pytest.importorskip(name, reason=reason)
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            pytest.skip(reason, allow_module_level=True)
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations)
    absent = [m for m in ("torchvision", "torchvision.transforms") if m not in sys.modules]
    sys.modules.update({m: mock.MagicMock() for m in absent})
    try:
        return importlib.import_module(name)
    finally:  # whoever looks for torchvision later must not find these
        for m in absent:
            del sys.modules[m]
