"""The live graphs of test_cuda_live.py on the devices of device.cpp: where ops are placed and what is copied, without a GPU. Run by test_other_device.py in
a process of its own, since devices that are registered stay there."""

from __future__ import annotations

import ctypes
import os

import pytest
from test_cuda_live import *  # noqa: F403

pytestmark: list[pytest.MarkDecorator] = []
del test_what_is_written_late_is_kept_until_then  # noqa: F821  (only ggml-cuda writes late)


@pytest.fixture(scope="module")
def backend() -> str:
    ctypes.CDLL(os.environ["OTHER_DEVICE"]).register_devices()
    return "OTHER"
