"""Upstream's test-backend-ops: building it and running its seqkv cases, which compare a backend with the scalar oracle."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CASES = {"SEQKV_FRAME": 6, "SEQKV_STORE": 106, "SEQKV_ATTN": 339}  # at least; ops never run unnoticed with fewer
FEW_STREAMS = "^(?!.*n_stream=(4|8|16|68),)"  # the others are for a kernel that CUDA alone has, and take a CPU long


def cmake(*arguments: str | Path) -> None:
    """Runs CMake, of this environment if it has one; fails with the end of its output."""
    own = Path(sys.executable).with_name("cmake")
    program = str(own) if own.exists() else shutil.which("cmake") or "cmake"
    done = subprocess.run([program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def build_directory() -> Path:
    """This environment's build directory; skips without one."""
    import scikit_build_core.builder.wheel_tag as tag

    build = ROOT / "build" / str(tag.WheelTag.compute_best(["native"]))
    found = [build] if (build / "CMakeCache.txt").is_file() else [c.parent for c in (ROOT / "build").glob("*/CMakeCache.txt")]
    if not found:
        pytest.skip("no build directory under build/: 'make test' makes one")
    return found[0]


def build(directory: Path) -> Path:
    """test-backend-ops of a build directory, brought up to date."""
    cmake("--build", directory, "--target", "test-backend-ops", "--parallel", str(os.cpu_count() or 1))
    return directory / "bin" / "test-backend-ops"


def run(command: Sequence[str | Path], expected: Mapping[str, int], parameters: str | None = None) -> None:
    """Runs the ops of `expected` on the CPU, cases whose parameters match a regular expression. All must pass, at least so many by op."""
    arguments = [*map(str, command), "test", "-b", "CPU", "-o", ",".join(expected), "-p", FEW_STREAMS + (f".*({parameters})" if parameters else "")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    failed = "\n".join(line for line in done.stdout.splitlines() if "FAIL" in line)
    assert done.returncode == 0, failed or done.stdout[-2000:] + done.stderr[-2000:]
    passed = Counter(re.findall(r"^\s*(SEQKV_\w+)\(.*OK", done.stdout, re.MULTILINE))
    assert f"{sum(passed.values())}/{sum(passed.values())} tests passed" in done.stdout, done.stdout[-2000:]
    assert all(passed[op] >= n for op, n in expected.items()), passed
