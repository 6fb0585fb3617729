"""Upstream's test-backend-ops on the seqkv ops: the CPU kernels against the scalar oracle."""

from __future__ import annotations

from pathlib import Path

import backend_ops
import pytest


@pytest.fixture(scope="module")
def binary() -> Path:
    return backend_ops.build(backend_ops.build_directory())


@pytest.mark.parametrize("op", backend_ops.CASES)
def test_cpu_against_oracle(binary: Path, op: str) -> None:
    backend_ops.run([binary], {op: backend_ops.CASES[op]})
