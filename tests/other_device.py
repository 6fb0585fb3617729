"""The live graphs of test_cuda_live.py on the devices of device.cpp: where ops are placed and what is copied, without a GPU. Run by test_other_device.py in
a process of its own, since devices that are registered stay there."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cuda_live import *  # noqa: F403

pytestmark: list[pytest.MarkDecorator] = []
del test_what_is_written_late_is_kept_until_then  # noqa: F821  (only ggml-cuda writes late)


@pytest.fixture(scope="module")
def backend() -> str:
    ctypes.CDLL(os.environ["OTHER_DEVICE"]).register_devices()
    return "OTHER"


def counter(name: str) -> Callable[[], int]:
    function = getattr(ctypes.CDLL(os.environ["OTHER_DEVICE"]), name)
    function.restype = ctypes.c_long
    return function


@pytest.mark.parametrize("kv", ["f16", "seqkv3"])
def test_inputs_of_a_token_are_copied_together(backend: str, tmp_path: Path, kv: str) -> None:
    """One wait for all of them (the device aborts if there is none), where ubatches do not take turns: with a layer on the CPU."""
    count = counter("copied_together")
    some = Models(tmp_path, 2)  # noqa: F405
    try:
        with Context(some("llama-3l"), Setup(kv=kv)) as c:  # noqa: F405
            c.decode(text(40))  # noqa: F405
            before = count()
            c.decode(text(1))  # noqa: F405
        assert count() - before >= 3
    finally:
        some.close()


def test_a_token_copies_what_changes(backend: str, gpu: Models) -> None:  # noqa: F405
    """Behind 3,000 tokens a token costs the copies of f16's cache (its mask), and what little changes of rotations and cells."""
    count = counter("bytes_set")
    usual, mean = {}, {}
    for kv in ("f16", "seqkv3"):
        sizes = []
        with Context(gpu("llama"), Setup(kv=kv, n_ctx=4096)) as c:  # noqa: F405
            c.decode(text(3000))  # noqa: F405
            for token in text(150, 1):  # noqa: F405
                before = count()
                c.decode([token])
                sizes.append(count() - before)
        usual[kv], mean[kv] = sorted(sizes)[75], sum(sizes) / 150
    assert usual["seqkv3"] - usual["f16"] < 4096
    assert mean["seqkv3"] - mean["f16"] < 4096
