"""The cache in live graphs on an NVIDIA GPU: against f32 on the CPU, and against the same cache there.

Ops alone are compared with the scalar oracle by test-backend-ops (tools/cuda_checks.py runs both). Here is what only a graph has:
fused and concurrent writes, CUDA graphs, the window, shifts, copies, states.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harness import FA_OFF, SEQKV, Context, Model, Models, Setup, api, kld, max_diff, text, tiny

from seqkv_edge.engine import devices

pytestmark = pytest.mark.cuda

ALL_LAYERS = 99
NAMES = ("llama", "llama-d128", "llama-g7", "qwen3", "gemma2", "sinks")


@pytest.fixture(scope="module")
def backend() -> str:
    """What names of devices and buffers begin with; tests/test_metal_live.py has another."""
    if not any(d.gpu and d.name.startswith("CUDA") for d in devices()):
        pytest.skip("no NVIDIA GPU, or libraries built without -DGGML_CUDA=ON")
    return "CUDA"


@pytest.fixture(scope="module")
def gpu(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    loaded = Models(tmp_path_factory.mktemp("gpu"), ALL_LAYERS)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    loaded = Models(tmp_path_factory.mktemp("cpu"))
    yield loaded
    loaded.close()


def truth(models: Models, name: str, tokens: list[int]) -> np.ndarray:
    with Context(models(name), Setup(kv="f32", flash_attn=FA_OFF)) as c:
        return c.decode(tokens)


def assert_codes_cost_the_same(models: Models, cpu: Models, name: str, kv: str) -> None:
    """Prefill of 200 tokens and decode of 130: the mean KLD to exact logits is the CPU's, within a fourth."""
    tokens = text(330)
    want = truth(cpu, name, tokens)
    cost = []
    for side in (models, cpu):
        with Context(side(name), Setup(kv=kv)) as c:
            got = np.concatenate([c.decode(tokens[:200]), c.decode(tokens[200:], step=1)])
        cost.append(kld(want, got)[90:].mean())
    assert cost[1] > 1e-5
    assert 0.8 <= cost[0] / cost[1] <= 1.25


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [1, 3, 8, 9, 64, None])
def test_window_of_whole_context_is_f16(gpu: Models, cpu: Models, name: str, step: int | None) -> None:
    """Codes are written but not read: as near to the exact logits as an f16 cache of upstream's on the same GPU, in any batches."""
    tokens = text(150)
    model = gpu(name)
    model.configure(n_window=512)
    logits = {}
    for kv in ("f16", "seqkv3"):
        with Context(model, Setup(kv=kv)) as c:
            logits[kv] = c.decode(tokens, step=step)
    want = truth(cpu, name, tokens)
    assert max_diff(logits["seqkv3"], want) <= 3 * max_diff(logits["f16"], want) + 0.01
    assert kld(want, logits["seqkv3"]).max() <= 3 * kld(want, logits["f16"]).max() + 5e-6


@pytest.mark.parametrize("n_window", [0, 2, 5])
@pytest.mark.parametrize("step", [1, 4, 8, 40])
def test_tokens_of_one_batch_read_each_other_as_blocks(gpu: Models, cpu: Models, n_window: int, step: int) -> None:
    """With a window shorter than a batch, attention reads cells that the same graph has just written."""
    tokens = text(200)
    want, cost = truth(cpu, "llama", tokens), []
    for models in (gpu, cpu):
        model = models("llama")
        model.configure(n_window=n_window, n_sink=0)
        with Context(model, Setup(kv="seqkv4")) as c:
            cost.append(kld(want, c.decode(tokens, step=step))[20:].mean())
    assert cost[1] > 1e-5
    assert 0.7 <= cost[0] / cost[1] <= 1.4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv", SEQKV)
def test_codes_cost_what_they_cost_on_the_cpu(gpu: Models, cpu: Models, name: str, kv: str) -> None:
    """Blocks that are written in prefill and in decode are read back as the CPU's are."""
    assert_codes_cost_the_same(gpu, cpu, name, kv)


def on_gpu(name: str, backend: str) -> bool:
    """Whether a buffer of this name is a GPU's: "CUDA0", not "CUDA_Host", which the CPU works in."""
    return re.match(rf"{backend}\d", name) is not None


def buffers_of_ops(model: Model, batches: tuple[int, ...] = (1, 3, 40)) -> dict[str, set[str]]:
    """Names of the buffers that results of the cache's ops lie in, by op."""
    lib = api._lib
    lib.ggml_op_desc.argtypes, lib.ggml_op_desc.restype = [ctypes.c_void_p], ctypes.c_char_p
    lib.ggml_backend_buffer_name.argtypes, lib.ggml_backend_buffer_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    seen: dict[str, set[str]] = {}

    @api.ggml_backend_sched_eval_callback
    def look(tensor: int, ask: bool, _data: object) -> bool:
        op = lib.ggml_op_desc(tensor).decode()
        if op.startswith("SEQKV_"):
            buffer = ctypes.c_void_p.from_address(tensor + 8).value  # struct ggml_tensor: type, buffer
            seen.setdefault(op, set()).add(lib.ggml_backend_buffer_name(buffer).decode())
        return not ask

    for n in batches:
        with Context(model, Setup(kv="seqkv3"), cb_eval=(look, 0)) as c:
            c.decode(text(n))
    assert set(seen) == {"SEQKV_FRAME", "SEQKV_STORE", "SEQKV_ATTN"}
    return seen


def test_attention_stays_on_the_gpu(gpu: Models, backend: str) -> None:
    """No op of the cache is placed on the CPU when all layers are offloaded."""
    seen = buffers_of_ops(gpu("llama"))
    assert all(on_gpu(name, backend) for names in seen.values() for name in names), seen


@pytest.mark.parametrize("n_ff", [512, 2048, 4096, 8192, 12544, 16384])
@pytest.mark.parametrize("n_before", [40, 700, 2500])
def test_what_is_written_late_is_kept_until_then(tmp_path: Path, backend: str, n_ff: int, n_before: int) -> None:
    """Decode writes its blocks at the end of the graph: no node after the STOREs has its result where their rows, cells or meta are."""
    if backend != "CUDA":
        pytest.skip("blocks are written at once")
    lib = api._lib
    lib.ggml_op_desc.argtypes, lib.ggml_op_desc.restype = [ctypes.c_void_p], ctypes.c_char_p
    lib.ggml_nbytes.argtypes, lib.ggml_nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
    lib.ggml_get_data.argtypes, lib.ggml_get_data.restype = [ctypes.c_void_p], ctypes.c_size_t
    kept: dict[range, str] = {}
    n_stores = n_later = 0

    def memory(tensor: int) -> range:
        data = lib.ggml_get_data(tensor)
        return range(data, data + lib.ggml_nbytes(tensor))

    @api.ggml_backend_sched_eval_callback
    def look(tensor: int, ask: bool, _data: object) -> bool:
        nonlocal n_stores, n_later
        op = lib.ggml_op_desc(tensor).decode()
        if not ask or op in ("RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE", "NONE"):
            return False
        result = memory(tensor)
        for other, what in kept.items():
            if max(result.start, other.start) < min(result.stop, other.stop):
                overwritten.append(f"{what} by {op}")
        n_later += n_stores > 0
        if op == "SEQKV_STORE":
            part = ctypes.c_int32.from_address(tensor + 84 + 24).value  # struct ggml_tensor: op_params; ggml_seqkv_params: part
            src = (ctypes.c_void_p * 4).from_address(tensor + 152)  # src
            if part != 2:  # rows of the window are written at once
                n_stores += 1
                kept.update({memory(src[0]): "rows", memory(src[1]): "cells", memory(src[3]): "meta"})
        return False

    overwritten: list[str] = []
    model = Model(tiny.write(tmp_path / "wide.gguf", replace(tiny.SPECS["llama"], n_ff=n_ff), "wide"), ALL_LAYERS)
    with Context(model, Setup(kv="seqkv3", n_ctx=4096), cb_eval=(look, 0)) as c:
        c.decode(text(n_before))
        kept.clear()
        overwritten.clear()
        n_stores = n_later = 0
        c.decode(text(2, 7)[1:])
    model.close()
    assert n_stores >= 4
    assert n_later > 4 * n_stores
    assert not overwritten


def test_some_layers_on_the_gpu(gpu: Models, cpu: Models, backend: str, tmp_path: Path) -> None:
    """With a part of the layers offloaded the others are the CPU's, and the codes cost the same. Attention over the CPU's cells
    goes to the GPU from 32 tokens on, as products with the CPU's weights do (Metal offloads nothing else)."""
    some = Models(tmp_path, 2)  # the output counts as a layer
    try:
        for n_tokens in (1, 31, 32, 40):
            seen = {op: {on_gpu(name, backend) for name in names} for op, names in buffers_of_ops(some("llama-3l"), (n_tokens,)).items()}
            assert seen["SEQKV_STORE"] == {True, False}, n_tokens
            assert seen["SEQKV_ATTN"] == ({True} if n_tokens >= 32 and backend != "MTL" else {True, False}), n_tokens
        assert_codes_cost_the_same(some, cpu, "llama-3l", "seqkv3")
    finally:
        some.close()


def test_layers_on_several_gpus(gpu: Models, cpu: Models, backend: str) -> None:
    """Layers that are split over GPUs keep their caches there, and the codes cost the same."""
    if sum(d.gpu and d.name.startswith(backend) for d in devices()) < 2:
        pytest.skip("one GPU")
    for op, names in buffers_of_ops(gpu("llama-3l")).items():
        assert len(names) > 1 and all(on_gpu(name, backend) for name in names), (op, names)
    assert_codes_cost_the_same(gpu, cpu, "llama-3l", "seqkv3")


@pytest.mark.parametrize("n_window", [64, 512])
def test_shift_fork_and_remove(gpu: Models, cpu: Models, n_window: int) -> None:
    """A history of shifts, copies and removals gives the CPU's logits, up to what single codes cost."""

    def history(models: Models) -> np.ndarray:
        model = models("llama")
        model.configure(n_window=n_window)
        with Context(model, Setup(kv="seqkv4", n_seq=2, unified=True)) as c:
            c.decode(text(220))
            c.shift(4, 37)
            c.decode(text(30, 3)[1:], step=1)
            c.cp(0, 1)
            assert c.rm(0, 150)
            out = [c.decode(text(20, 4)[1:], seq=0, step=1), c.decode(text(40, 5)[1:], seq=1)]
            return np.concatenate(out)

    a, b = history(gpu), history(cpu)
    assert kld(b, a).mean() <= (2e-5 if n_window == 512 else 2e-3)


def test_states_go_between_backends(gpu: Models, cpu: Models) -> None:
    """A state saved on the GPU is read there and on the CPU, and the other way round."""
    tokens, tail = text(200), text(20, 6)[1:]
    states, want = {}, {}
    for name, models in (("gpu", gpu), ("cpu", cpu)):
        with Context(models("qwen3"), Setup(kv="seqkv3")) as c:
            c.decode(tokens)
            states[name] = c.save_seq()
            want[name] = c.decode(tail, step=1)
    for source in states:
        for target, models in (("gpu", gpu), ("cpu", cpu)):
            with Context(models("qwen3"), Setup(kv="seqkv3")) as c:
                assert c.load_seq(states[source]) == len(states[source])
                assert c.save_seq() == states[source]
                got = c.decode(tail, step=1)
            if source == target:
                assert np.array_equal(got, want[source])
            else:
                assert kld(want[source], got).mean() <= 1e-4
