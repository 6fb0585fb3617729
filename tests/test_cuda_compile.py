"""The CUDA sources compile, for the oldest architecture with tensor cores that they use. Nothing is run: that is tools/cuda_checks.py."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "native" / "cuda").glob("*.cu"))


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if os.access(p, os.X_OK)), None)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ggml's headers of a patched tree, with this native/ in it."""
    found = [p.parents[3] for p in (ROOT / "build").glob("*/llama.cpp/ggml/src/ggml-cuda/common.cuh")]
    if not found:
        pytest.skip("no patched tree under build/: 'make test' makes one")
    src = tmp_path_factory.mktemp("cuda") / "ggml" / "src"
    shutil.copytree(found[0] / "ggml" / "include", src.parent / "include")
    shutil.copytree(found[0] / "ggml" / "src" / "ggml-cuda", src / "ggml-cuda", ignore=shutil.ignore_patterns("*.cu"))
    for header in (found[0] / "ggml" / "src").glob("*.h"):
        shutil.copy(header, src)
    shutil.copytree(ROOT / "native", src / "seqkv")
    return src


def test_sources_compile(tree: Path) -> None:
    nvcc = find_nvcc()
    if not nvcc:
        pytest.skip("no nvcc: install the CUDA toolkit's compiler to check the CUDA sources")
    assert len(SOURCES) >= 4

    def compile_one(source: Path) -> tuple[str, subprocess.CompletedProcess[str]]:
        command = [nvcc, "-std=c++17", "-arch=sm_75", "-cubin", "-Xptxas", "-O1", "-use_fast_math", "-extended-lambda", "-Werror", "all-warnings",
                   "-diag-suppress", "177", "-I", str(tree), "-I", str(tree.parent / "include"), "-o", str(tree / (source.stem + ".cubin")),
                   str(tree / "seqkv" / "cuda" / source.name)]  # fmt: skip
        return source.name, subprocess.run(command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        for name, done in pool.map(compile_one, SOURCES):
            assert done.returncode == 0, f"{name}:\n{done.stderr[-3000:]}"
