"""Upstream's test-backend-ops on the seqkv ops: the CPU kernels against the scalar oracle."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPS = ("SEQKV_FRAME", "SEQKV_STORE", "SEQKV_ATTN")


@pytest.fixture(scope="module")
def binary() -> Path:
    """test-backend-ops of this environment's build directory, brought up to date."""
    import scikit_build_core.builder.wheel_tag as tag

    build = ROOT / "build" / str(tag.WheelTag.compute_best(["native"]))
    found = [build] if (build / "CMakeCache.txt").is_file() else [c.parent for c in (ROOT / "build").glob("*/CMakeCache.txt")]
    if not found:
        pytest.skip("no build directory under build/: 'make test' makes one")
    cmake = Path(sys.executable).with_name("cmake")
    command = [str(cmake) if cmake.exists() else shutil.which("cmake") or "cmake", "--build", str(found[0]), "--target", "test-backend-ops"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return found[0] / "bin" / "test-backend-ops"


@pytest.mark.parametrize("op", OPS)
def test_cpu_against_oracle(binary: Path, op: str) -> None:
    done = subprocess.run([str(binary), "test", "-b", "CPU", "-o", op], capture_output=True, text=True, check=False)
    counts = re.search(r"(\d+)/(\d+) tests passed", done.stdout)
    assert counts, done.stdout[-2000:] + done.stderr[-2000:]
    passed, total = map(int, counts.groups())
    assert done.returncode == 0 and passed == total, "\n".join(x for x in done.stdout.splitlines() if "FAIL" in x)
    assert total >= {"SEQKV_FRAME": 6, "SEQKV_STORE": 72, "SEQKV_ATTN": 339}[op] and "not supported" not in done.stdout
