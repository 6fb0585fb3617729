"""The live graphs of test_cuda_live.py on an Apple GPU."""

from __future__ import annotations

import pytest
from test_cuda_live import *  # noqa: F403

from seqkv_edge.engine import devices

pytestmark = pytest.mark.metal


@pytest.fixture(scope="module")
def backend() -> str:
    if not any(d.gpu and d.name.startswith("MTL") for d in devices()):
        pytest.skip("no Apple GPU, or libraries built without -DGGML_METAL=ON")
    return "MTL"
