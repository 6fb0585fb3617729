"""Layers on devices other than the CPU: placement, copies, states, on a machine without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from seqkv_edge import llama

HERE = Path(__file__).resolve().parent
LIB = HERE.parent / "seqkv_edge" / "lib"


def test_live_graphs_on_other_devices(tmp_path: Path) -> None:
    """What test_cuda_live.py asserts of a GPU holds of two devices that compute as the CPU does, with memory of their own."""
    trees = sorted((HERE.parent / "build").glob("*/llama.cpp/ggml"))
    if not llama.library().patched or not trees:
        pytest.skip("needs the patched libraries and their tree under build/: 'make test' makes them")
    if not shutil.which("c++") or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C++ compiler")
    library = tmp_path / "device.so"
    subprocess.run(
        ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-I", trees[-1] / "include", "-I", trees[-1] / "src",
         "-o", library, HERE / "device.cpp", "-L", LIB, "-lggml", "-lggml-base", "-lggml-cpu"],
        check=True,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-o", "addopts=", HERE / "other_device.py"],
        env=os.environ | {"OTHER_DEVICE": str(library)}, cwd=HERE.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert passed and int(passed[1]) >= 70 and "skipped" not in done.stdout
