"""The Metal emulator of tests/metal/: it finds what is wrong with a kernel, and runs upstream's attention kernels as the CPU backend does."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "metal"))

import emulator  # noqa: E402

CACHE = ROOT / "build" / "metal"
SCHEDULES = (0, 1, 2, 3)  # forward, backward, two random ones

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing())


def run(library: emulator.Library, kernel: str, grid: Sequence[int], threads: Any, buffers: Sequence[Any], memory: int = 0,
        constants: dict[int, int] = {}, schedule: int = 0, lockstep: bool = False) -> dict[str, int]:  # fmt: skip
    """buffers: arrays, or (array, byte offset), by index; each array is a region."""
    pairs = [b if isinstance(b, tuple) else (b, 0) for b in buffers]
    regions = {(a.ctypes.data, a.nbytes) for a, _ in pairs}
    return library.run(
        kernel,
        grid,
        threads,
        {i: a.ctypes.data + at for i, (a, at) in enumerate(pairs)},
        sorted(regions),
        memory,
        constants,
        schedule,
        lockstep,
    )


# ---- kernels of our own

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
GOOD = (
    HEAD
    + """
constant int FACTOR [[function_constant(5)]];
kernel void sums(device const float * x, device float * y, uint group [[threadgroup_position_in_grid]],
        ushort i [[thread_index_in_threadgroup]], ushort sg [[simdgroup_index_in_threadgroup]], ushort lane [[thread_index_in_simdgroup]]) {
    threadgroup float part[4];
    const float sum = simd_sum(x[128*group + i]);
    if (lane == 0) {
        part[sg] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (i == 0) {
        y[group] = FACTOR*(part[0] + part[1] + part[2] + part[3]);
    }
}
kernel void reversed(device const half4 * x, device half4 * y, threadgroup half4 * shared [[threadgroup(0)]],
        ushort lane [[thread_index_in_simdgroup]]) {
    shared[31 - lane] = 2.0h*x[lane];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    y[lane] = shared[lane];
}
kernel void shuffles(device const int * x, device int * y, ushort lane [[thread_index_in_simdgroup]]) {
    const int v = x[lane];
    y[lane]       = simd_shuffle_xor(v, 5);
    y[32 + lane]  = simd_shuffle_down(v, 8);
    y[64 + lane]  = simd_shuffle(v, (ushort) (31 - lane));
    y[96 + lane]  = simd_prefix_exclusive_sum(v);
    y[128 + lane] = simd_max(v) - simd_min(v);
    y[160 + lane] = simd_any(v == 7) + 2*simd_all(v == 7);
}
constant float table[4] = { 1.0f, 2.0f, 4.0f, 8.0f };
kernel void tabled(device const int * x, device float * y, ushort lane [[thread_index_in_simdgroup]]) {
    y[lane] = table[x[lane]] + (x[lane] & 2);
}
kernel void copies(device const int * x, device int * y, ushort lane [[thread_index_in_simdgroup]]) {
    threadgroup int shared[32*16];
    int own[16];
    for (int i = 0; i < 16; ++i) {
        own[i] = x[16*lane + i];
    }
    for (int i = 0; i < 16; ++i) {
        shared[16*lane + i] = own[i]; // a call of memcpy
    }
    simdgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
    for (int i = 0; i < 16; ++i) {
        y[16*lane + i] = shared[(16*lane + 16*i + i)%512];
    }
}
kernel void dots(device const half4 * x, device float * y, ushort lane [[thread_index_in_simdgroup]]) {
    y[lane] += dot((float4) x[lane], (float4) x[31 - lane]);
}
template <typename T>
kernel void multiply(device const T * a, device const T * b, device float * c) {
    simdgroup_matrix<T, 8, 8> ma, mb;
    simdgroup_float8x8 mc = make_filled_simdgroup_matrix<float, 8>(1.0f);
    simdgroup_load(ma, a, 16);
    simdgroup_load(mb, b, 16, 0, true);
    simdgroup_multiply_accumulate(mc, ma, mb, mc);
    simdgroup_store(mc, c, 16);
}
typedef decltype(multiply<float>) multiply_t;
typedef decltype(multiply<half>)  multiply_half_t;
template [[host_name("multiply_f32")]] kernel multiply_t      multiply<float>;
template [[host_name("multiply_f16")]] kernel multiply_half_t multiply<half>;
"""
)

LOCKSTEP = HEAD + """
kernel void lockstep(device const int * x, device int * y, ushort i [[thread_index_in_threadgroup]],
        ushort lane [[thread_index_in_simdgroup]], ushort sg [[simdgroup_index_in_threadgroup]]) {
    threadgroup int shared[2][32], same[32];
    shared[sg][lane] = x[lane];
    same[lane] = 5*x[lane];
    int sum = 0;
    for (int k = 0; k <= lane%4; ++k) {
        sum += shared[sg][(lane + k + 1)%32];
    }
    if (lane == 3) {
        shared[sg][lane] = 99;
        shared[sg][7]    = 99;
    } else if (lane%2 == 0) {
        shared[sg][9] = sum; // the last lane's stays
    }
    shared[sg][lane] += shared[sg][(lane + 7)%32];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i]      = sum;
    y[64 + i] = shared[sg][lane] + same[31 - lane];
}
"""


@pytest.fixture(scope="module")
def good() -> emulator.Library:
    return emulator.load(GOOD, CACHE)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_threads_and_simdgroups(good: emulator.Library, schedule: int) -> None:
    x, y = np.arange(256, dtype=np.float32), np.full(2, np.nan, np.float32)
    counters = run(good, "sums", (2, 1, 1), 128, [x, y], 0, {5: 3}, schedule)
    assert y.tolist() == [3 * x[:128].sum(), 3 * x[128:].sum()]
    assert counters["load_bytes"] == 1024 and counters["loads"] == 256 and counters["store_bytes"] == 8
    assert counters["simd"] == 8 and counters["barriers"] == 2 and counters["threadgroup_stores"] == counters["threadgroup_loads"] == 8
    assert counters["float_operations"] == 2 * 4  # of thread 0; those of simd_sum are its own

    h, r = np.linspace(-3, 3, 128).astype(np.float16), np.zeros(128, np.float16)
    counters = run(good, "reversed", (1, 1, 1), 32, [h, r], 256, {}, schedule)
    assert (r.reshape(32, 4) == 2 * h.reshape(32, 4)[::-1]).all()
    assert counters["loads"] == 32 and counters["load_bytes"] == 256 and counters["float_operations"] == 128

    v, s = np.random.default_rng(1).integers(-99, 99, 32).astype(np.int32), np.zeros(192, np.int32)
    run(good, "shuffles", (1, 1, 1), 32, [v, s], 0, {}, schedule)
    lane = np.arange(32)
    down = np.where(lane < 24, np.roll(v, -8), v)
    expected = [v[lane ^ 5], down, v[::-1], np.cumsum(v) - v, np.full(32, v.max() - v.min()), np.full(32, int(7 in v))]
    assert (s.reshape(6, 32) == np.array(expected)).all()


def test_tables(good: emulator.Library) -> None:
    x, y = np.arange(32, dtype=np.int32) % 4, np.zeros(32, np.float32)
    counters = run(good, "tabled", (1, 1, 1), 32, [x, y])
    assert (y == 2.0**x + (x & 2)).all()
    assert (counters["constant_loads"], counters["integer_operations"], counters["float_operations"]) == (32, 32, 32)


def test_copies_are_accesses(good: emulator.Library) -> None:
    x, y = np.arange(512, dtype=np.int32), np.zeros(512, np.int32)
    counters = run(good, "copies", (1, 1, 1), 32, [x, y])
    i = np.arange(512)
    assert (y == x[(i // 16 * 16 + i % 16 * 17) % 512]).all()
    assert counters["load_bytes"] == counters["store_bytes"] == 2048 and counters["threadgroup_bytes"] == 2 * 2048


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lockstep(schedule: int) -> None:
    """A simdgroup goes through the code as one thread does; two of them may store the same."""
    x, y = np.arange(32, dtype=np.int32) ** 2, np.zeros(128, np.int32)
    library = emulator.load(LOCKSTEP, CACHE)
    run(library, "lockstep", (1, 1, 1), 64, [x, y], lockstep=True, schedule=schedule)
    lane = np.arange(32)
    sums = sum(np.where(k <= lane % 4, x[(lane + k + 1) % 32], 0) for k in range(4))
    shared = x.copy()
    shared[[3, 7]] = 99
    stored = y.reshape(2, 2, 32)[1] - 5 * x[::-1]
    for own in stored:
        shared[9] = own[9] - shared[16]  # by any of the even lanes
        assert shared[9] in sums[::2]
        assert (own == shared + shared[(lane + 7) % 32]).all()
    assert (y.reshape(2, 2, 32)[0] == sums).all()
    with pytest.raises(emulator.EmulatorError, match="race|not written"):
        run(library, "lockstep", (1, 1, 1), 64, [x, y], schedule=schedule)
    other = emulator.load(LOCKSTEP.replace("5*x[lane]", "(5 + sg)*x[lane]"), CACHE)
    with pytest.raises(emulator.EmulatorError, match="race: store of 4 bytes of threadgroup memory"):
        run(other, "lockstep", (1, 1, 1), 64, [x, y], lockstep=True, schedule=schedule)


def test_a_dot_is_seven_operations(good: emulator.Library) -> None:
    """Not what a vector unit of the CPU would do for it."""
    x, y = np.ones((32, 4), np.float16), np.ones(32, np.float32)
    counters = run(good, "dots", (1, 1, 1), 32, [x, y])
    assert (y == 5).all() and counters["float_operations"] == 32 * (4 + 3 + 1)


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "multiply_f32"), (np.float16, "multiply_f16")])
def test_simdgroup_matrices(good: emulator.Library, dtype: type, name: str) -> None:
    rng = np.random.default_rng(2)
    a, b, c = rng.standard_normal((8, 16)).astype(dtype), rng.standard_normal((8, 16)).astype(dtype), np.zeros((8, 16), np.float32)
    counters = run(good, name, (1, 1, 1), 32, [a, b, c])
    np.testing.assert_allclose(c[:, :8], 1 + a[:, :8].astype(np.float64) @ b[:, :8].astype(np.float64).T, rtol=1e-5, atol=1e-5)
    assert not c[:, 8:].any() and counters["matrix"] == 1


# name, what is changed in GOOD, by what, kernel, what the error says
FAULTS = [
    ("no barrier", "    threadgroup_barrier(mem_flags::mem_threadgroup);", "", "sums", "race|not written"),
    ("a barrier of the simdgroup only", "    threadgroup_barrier(mem_flags::mem_threadgroup);", "    simdgroup_barrier(mem_flags::mem_threadgroup);", "sums", "race|not written"),
    ("a barrier for other memory", "threadgroup_barrier(mem_flags::mem_threadgroup)", "threadgroup_barrier(mem_flags::mem_device)", "sums", "race"),
    ("a barrier that some do not reach", "    threadgroup_barrier(mem_flags::mem_threadgroup);",
     "    if (sg != 2) { threadgroup_barrier(mem_flags::mem_threadgroup); }", "sums", "waits for threads that do not come: 96 of 128"),
    ("two barriers in the place of one", "    threadgroup_barrier(mem_flags::mem_threadgroup);",
     "    if (sg == 2) {\n threadgroup_barrier(mem_flags::mem_threadgroup);\n } else {\n threadgroup_barrier(mem_flags::mem_threadgroup); }", "sums", "different barriers"),
    ("simd function in divergent flow", "const float sum = simd_sum(x[128*group + i]);", "float sum = 0.0f; if (lane > 3) { sum = simd_sum(x[128*group + i]); }", "sums", "28 of 128|do not come"),
    ("two simd functions at once", "const float sum = simd_sum(x[128*group + i]);",
     "float sum = 0.0f; if (lane > 3) {\n sum = simd_sum(x[i]);\n } else {\n sum = simd_max(x[i]); }", "sums", "divergent flow"),
    ("load behind a buffer", "x[128*group + i]", "x[128*group + i + 1]", "sums", "outside of all buffers|beyond the end"),
    ("load before a buffer", "x[128*group + i]", "x[128*group + i - 1]", "sums", "outside of all buffers"),
    ("store behind a buffer", "y[group] =", "y[group + 1] =", "sums", "store of 4 bytes outside of all buffers"),
    ("store to a constant buffer", "y[group] =", "((device float *) x)[group] =", "sums", "buffer that is constant"),
    ("all threadgroups store to one place", "y[group] =", "y[0] =", "sums", "race: store of 4 bytes of device memory"),
    ("threadgroup array too short", "part[4]", "part[3]", "sums", "outside of threadgroup memory"),
    ("threadgroup memory too large", "part[4]", "part[8193]", "sums", "more than 32 KB"),
    ("no barrier of the simdgroup", "    simdgroup_barrier(mem_flags::mem_threadgroup);", "", "reversed", "race|not written"),
    ("a copy too short", "for (int i = 0; i < 16; ++i) {\n        shared", "for (int i = 0; i < 15; ++i) {\n        shared", "copies", "not written"),
    ("a copy from behind a buffer", "= x[16*lane + i];", "= x[16*lane + 1 + i];", "copies", "outside of all buffers|beyond the end"),
    ("no barrier after a copy", "    simdgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);", "", "copies", "race|not written"),
    ("misaligned load", "2.0h*x[lane]", "2.0h*((device const half4 *) ((device const half *) x + 1))[min((int) lane, 30)]", "reversed", "misaligned load of 8 bytes"),
    ("shared memory behind its end", "shared[31 - lane]", "shared[32 - lane]", "reversed", "outside of threadgroup memory"),
    ("lane that there is not", "(ushort) (31 - lane)", "(ushort) (32 - lane)", "shuffles", "a lane that there is not"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "kernel", "says"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_faults_are_found_in_every_order(old: str, new: str, kernel: str, says: str) -> None:
    assert GOOD.count(old) == 1
    library = emulator.load(GOOD.replace(old, new), CACHE, rf"^{kernel}$")
    y = {"sums": np.zeros(2, np.float32), "reversed": np.zeros(128, np.float16), "shuffles": np.zeros(192, np.int32), "copies": np.zeros(512, np.int32)}[kernel]
    x = {"sums": np.zeros(256, np.float32), "reversed": np.zeros(128, np.float16), "shuffles": np.zeros(32, np.int32), "copies": np.zeros(512, np.int32)}[kernel]
    for schedule in SCHEDULES:
        with pytest.raises(emulator.EmulatorError, match=says):
            run(library, kernel, (y.size if kernel == "sums" else 1, 1, 1), 128 if kernel == "sums" else 32, [x, y], 256, {5: 1}, schedule)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("template <int N> void f() { if constexpr (N > 0) {} }", "constexpr if"),
        ("kernel void k(device float * x [[buffer(1)]], device float * y [[buffer(1)]]) {}", "two arguments are buffer 1"),
        ("kernel void k(device float * x, ushort i [[thread_index]]) {}", "cannot pass ushort i"),
        ("#include <stdint.h>", "stdint.h"),
        ("kernel void k(device half4 * x, device float4 * y) { x[0] = y[0]; }", "no viable"),
    ],
)
def test_sources_that_metal_does_not_take(text: str, says: str) -> None:
    with pytest.raises(emulator.EmulatorError, match=says):
        emulator.load(f"{HEAD}kernel void other(device float * x) {{ x[0] = 1.0f; }}\n{text}\n", CACHE)


def test_no_such_kernel(good: emulator.Library) -> None:
    with pytest.raises(emulator.EmulatorError, match="no kernel of that name"):
        run(good, "other", (1, 1, 1), 32, [np.zeros(1)])


# ---- upstream's attention

F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8  # ggml_type
CELL = {"f16": (F16, 1, 2), "q8_0": (Q8_0, 32, 34), "q4_0": (Q4_0, 32, 18)}  # type, values and bytes of a block


@pytest.fixture(scope="module")
def tree() -> Path:
    found = sorted((ROOT / "build").glob("*/llama.cpp/ggml"))
    if not found:
        pytest.skip("no patched tree under build/: 'make test' makes one")
    return found[0]


def upstream(tree: Path, name: str, kernels: str, baked: dict[int, int] = {}) -> emulator.Library:
    metal = tree / "src" / "ggml-metal"
    return emulator.load(emulator.flatten(metal / "kernels" / name, [metal / "kernels", metal, metal.parent], set()), CACHE, kernels, baked)


def arguments(tree: Path, name: str, **values: Any) -> np.ndarray:
    """A struct of ggml-metal-impl.h, as bytes; all of its fields have to be given."""
    header = (tree / "src" / "ggml-metal" / "ggml-metal-impl.h").read_text()
    body = re.search(rf"typedef struct \{{([^}}]*)\}} ggml_metal_kargs_{name};", header).group(1)
    kinds = {"int32_t": ctypes.c_int32, "uint64_t": ctypes.c_uint64, "float": ctypes.c_float}
    fields = [(n, kinds[t]) for t, n in re.findall(r"(\w+)\s+(\w+);", body)]
    assert {n for n, _ in fields} <= set(values), {n for n, _ in fields} - set(values)
    struct = type(name, (ctypes.Structure,), {"_fields_": fields})
    return np.frombuffer(bytes(struct(**{n: values[n] for n, _ in fields})), np.uint8).copy()


@dataclass
class Attention:
    """Inputs of attention: q (seqs, heads, tokens, d) f32; k, v (seqs, kv heads, rows, bytes of d); mask (seqs, tokens, rows) f16."""

    type: str
    d: int
    heads: int
    kv_heads: int
    rows: int
    tokens: int
    seqs: int = 1
    softcap: float = 0.0
    sinks: bool = False

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.d + self.rows + self.tokens)
        self.scale = self.d**-0.5
        self.q = rng.standard_normal((self.seqs, self.heads, self.tokens, self.d), dtype=np.float32)
        shape = (self.seqs, self.kv_heads, self.rows, self.d)
        self.k, self.k_exact = self.cells(rng.standard_normal(shape, dtype=np.float32))
        self.v, self.v_exact = self.cells(rng.standard_normal(shape, dtype=np.float32))
        seen = rng.random((self.seqs, self.tokens, self.rows)) < 0.8
        seen[..., 0] = True
        self.mask = np.where(seen, rng.standard_normal(seen.shape) * 0.1, -np.inf).astype(np.float16)
        self.sink = rng.standard_normal(self.heads).astype(np.float32)

    def cells(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.type == "f16":
            return x.astype(np.float16).view(np.uint8), x.astype(np.float16).astype(np.float64)
        blocks = x.reshape(*x.shape[:-1], -1, 32)
        if self.type == "q4_0":
            scale = (np.abs(blocks).max(-1, keepdims=True) / 7).astype(np.float16)
            codes = np.round(blocks / scale.astype(np.float32)).astype(np.int8)
            nibbles = (codes + 8).view(np.uint8)
            bytes_ = [scale.view(np.uint8).reshape(*codes.shape[:-1], 2), nibbles[..., :16] | nibbles[..., 16:] << 4]
            return np.concatenate(bytes_, -1).reshape(*x.shape[:-1], -1).copy(), (codes * scale.astype(np.float64)).reshape(x.shape)
        scale = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16)
        codes = np.round(blocks / scale.astype(np.float32)).astype(np.int8)
        cells = np.concatenate([scale.view(np.uint8).reshape(*codes.shape[:-1], 2), codes.view(np.uint8)], -1)
        return cells.reshape(*x.shape[:-1], -1).copy(), (codes * scale.astype(np.float64)).reshape(x.shape)

    def exact(self) -> np.ndarray:
        """In float64, (seqs, tokens, heads, d)."""
        group = self.heads // self.kv_heads
        k, v = np.repeat(self.k_exact, group, 1), np.repeat(self.v_exact, group, 1)
        s = self.scale * np.einsum("shtd,shrd->shtr", self.q.astype(np.float64), k)
        s = self.softcap * np.tanh(s / self.softcap) if self.softcap else s
        s += self.mask.astype(np.float64)[:, None]
        sink = self.sink.astype(np.float64)[None, :, None, None]
        m = np.maximum(s.max(-1, keepdims=True), sink) if self.sinks else s.max(-1, keepdims=True)
        p = np.exp(s - m)
        return np.einsum("shtr,shrd->sthd", p / (p.sum(-1, keepdims=True) + (np.exp(sink - m) if self.sinks else 0)), v)

    def cpu(self) -> np.ndarray:
        """By the CPU backend."""
        import seqkv_edge

        libraries = Path(seqkv_edge.__file__).parent / "lib"
        base = ctypes.CDLL(str(next(libraries.glob("libggml-base.*"))), mode=ctypes.RTLD_GLOBAL)
        backend = ctypes.CDLL(str(next(libraries.glob("libggml-cpu.*"))))
        p = ctypes.c_void_p

        class Params(ctypes.Structure):
            _fields_ = [("size", ctypes.c_size_t), ("buffer", p), ("no_alloc", ctypes.c_bool)]

        def call(library: ctypes.CDLL, name: str, *values: Any, result: Any = p) -> Any:
            f = library[name]
            f.restype, f.argtypes = result, [type(x) for x in values]
            return f(*values)

        context = p(call(base, "ggml_init", Params(256 << 20, None, False)))

        def tensor(data: np.ndarray, type_: int, *ne: int) -> ctypes.c_void_p:
            t = p(call(base, "ggml_new_tensor_4d", context, ctypes.c_int(type_), *map(ctypes.c_int64, ne)))
            assert call(base, "ggml_nbytes", t, result=ctypes.c_size_t) == data.nbytes
            ctypes.memmove(call(base, "ggml_get_data", t), data.ctypes.data, data.nbytes)
            return t

        type_ = CELL[self.type][0]
        q = tensor(self.q, F32, self.d, self.tokens, self.heads, self.seqs)
        k, v = (tensor(x, type_, self.d, self.rows, self.kv_heads, self.seqs) for x in (self.k, self.v))
        mask = tensor(self.mask, F16, self.rows, self.tokens, 1, self.seqs)
        out = p(call(base, "ggml_flash_attn_ext", context, q, k, v, mask, *map(ctypes.c_float, (self.scale, 0.0, self.softcap))))
        if self.sinks:
            call(base, "ggml_flash_attn_ext_add_sinks", out, tensor(self.sink, F32, self.heads, 1, 1, 1), result=None)
        graph = p(call(base, "ggml_new_graph", context))
        call(base, "ggml_build_forward_expand", graph, out, result=None)
        assert call(backend, "ggml_graph_compute_with_ctx", context, graph, ctypes.c_int(1), result=ctypes.c_int) == 0
        y = np.empty((self.seqs, self.tokens, self.heads, self.d), np.float32)
        ctypes.memmove(y.ctypes.data, call(base, "ggml_get_data", out), y.nbytes)
        call(base, "ggml_free", context, result=None)
        return y

    def metal(
        self, tree: Path, vec: bool, nwg: int = 32, nsg: int = 1, schedule: int = 0, baked: bool = False, lockstep: bool = True
    ) -> tuple[np.ndarray, dict[str, int]]:
        """By ggml_metal_op_flash_attn_ext's launches; the counters are those of the attention kernel, and of the reduction added.

        Upstream's kernels take it that a simdgroup runs in lockstep: lanes zero the same values, and scratch memory is written again
        without a barrier after other lanes have read it. Several simdgroups store the same queries."""
        a, d, q = self, self.d, 1 if vec else 8
        c = 32 if vec else 64  # rows of a step
        block = CELL[a.type][2]
        row = a.k.shape[-1]
        strides = dict(nb11=row, nb12=row * a.rows, nb13=row * a.rows * a.kv_heads)
        strides |= {name.replace("1", "2", 1): n for name, n in strides.items()}
        mask = dict(
            ne30=a.rows, ne31=a.tokens, ne32=1, ne33=a.seqs, nb31=2 * a.rows, nb32=2 * a.rows * a.tokens, nb33=2 * a.rows * a.tokens
        )
        kv = dict(ne11=a.rows, ne_12_2=a.kv_heads, ne_12_3=a.seqs)
        common = {
            **strides, **mask, **kv, "ne01": a.tokens, "ne02": a.heads, "ne03": a.seqs, "nb01": 4 * d, "nb02": 4 * d * a.tokens, "nb03": 4 * d * a.tokens * a.heads,
            "ns10": row // block, "ns20": row // block, "ne1": a.heads, "ne2": a.tokens, "ne3": a.seqs, "scale": a.scale / (a.softcap or 1.0), "max_bias": 0.0,
            "m0": 1.0, "m1": 1.0, "n_head_log2": a.heads, "logit_softcap": a.softcap, "n_kv_max_padded": 0,
        }  # fmt: skip
        nan = 0xFF
        pad = np.full(c * a.seqs * (2 * row * a.kv_heads + 2 * a.tokens), nan, np.uint8)
        if a.rows % c:
            library = upstream(tree, "fa_aux.metal", "_pad$")
            args = arguments(tree, "flash_attn_ext_pad", **common)
            run(
                library,
                "kernel_flash_attn_ext_pad",
                (c, max(a.kv_heads, 1), a.seqs),
                32,
                [args, a.k, a.v, a.mask, pad],
                0,
                {100: 1, 125: c},
                schedule,
            )
        out = np.full((a.seqs, a.tokens, a.heads, d), np.nan, np.float32)
        n_out = a.seqs * a.tokens * a.heads
        name = f"{a.type}_dk{d}_dv{d}"
        if not vec:
            tiles = (-(-a.rows // c), -(-a.tokens // q))
            blocks = np.full(tiles[0] * tiles[1] * a.seqs, nan, np.uint8)
            run(upstream(tree, "fa_aux.metal", "_blk$"), "kernel_flash_attn_ext_blk", (*tiles, a.seqs), 32,
                [arguments(tree, "flash_attn_ext_blk", **common), a.mask, blocks], 0, {224: q, 225: c}, schedule)  # fmt: skip
            memory = 2 * (q * (d + 2 * -(-d // 64) * 64 + 4 * c) + (16 * 32 * 4 if a.type != "f16" else 0))
            constants = {
                300: 1,
                301: int(a.sinks),
                302: 0,
                303: int(bool(a.softcap)),
                304: int(a.rows % c > 0),
                310: int(a.tokens % 8 > 0),
                320: row // block,
                321: row // block,
                322: 4,
            }
            library = upstream(tree, f"fa_{a.type}.metal", f"{name}$", constants if baked else {})
            counters = run(library, f"kernel_flash_attn_ext_{name}", (-(-a.tokens // q), a.heads, a.seqs), (32, 4, 1),
                           [arguments(tree, "flash_attn_ext", **common), a.q, a.k, a.v, a.mask, a.sink, pad, blocks, out], memory, constants, schedule, lockstep)  # fmt: skip
            return out, counters
        padded = -(-d // 128) * 128
        memory = 2 * nsg * (padded + 4 * c + 2 * padded)
        constants = {
            400: 1,
            401: int(a.sinks),
            402: 0,
            403: int(bool(a.softcap)),
            404: int(a.rows % c > 0),
            405: 0,
            420: row // block,
            421: row // block,
            422: nsg,
            423: nwg,
        }
        library = upstream(tree, f"fa_vec_{a.type}.metal", f"{name}$", constants if baked else {})
        parts = np.full(n_out * nwg * (d + 2), np.nan, np.float32) if nwg > 1 else out
        counters = run(library, f"kernel_flash_attn_ext_vec_{name}", (a.tokens, a.heads, a.seqs * nwg), (32, nsg, 1),
                       [arguments(tree, "flash_attn_ext_vec", **common), a.q, a.k, a.v, a.mask, a.sink, pad, parts, a.q], memory, constants, schedule, lockstep)  # fmt: skip
        if nwg > 1:
            more = run(upstream(tree, "fa_aux.metal", "vec_reduce$"), "kernel_flash_attn_ext_vec_reduce", (n_out, 1, 1), 32 * nwg,
                       [arguments(tree, "flash_attn_ext_vec_reduce", nrows=n_out), parts, out], 0, {500: d, 501: nwg}, schedule)  # fmt: skip
            counters = {n: counters[n] + more[n] for n in counters}
        return out, counters


def error(y: np.ndarray, x: np.ndarray) -> float:
    """Normalized mean squared error, as in test-backend-ops."""
    return float(((y.astype(np.float64) - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum())


CASES = [
    (True, Attention("f16", 64, 4, 2, 67, 1)),
    (True, Attention("f16", 128, 4, 1, 96, 2, seqs=2)),
    (True, Attention("f16", 256, 2, 2, 33, 1, sinks=True)),
    (True, Attention("q8_0", 64, 4, 1, 160, 3, softcap=10.0)),
    (True, Attention("q8_0", 128, 8, 2, 67, 1, seqs=2, sinks=True)),
    (True, Attention("q8_0", 256, 2, 1, 64, 1)),
    (True, Attention("q4_0", 128, 4, 2, 300, 1)),
    (False, Attention("f16", 64, 4, 2, 128, 20)),
    (False, Attention("f16", 128, 4, 1, 82, 21, seqs=2)),
    (False, Attention("f16", 256, 2, 1, 64, 24, sinks=True)),
    (False, Attention("q8_0", 64, 2, 1, 70, 24, softcap=10.0)),
    (False, Attention("q8_0", 128, 4, 2, 128, 21)),
]


@pytest.mark.parametrize(("vec", "case"), CASES, ids=[f"{'vec' if vec else 'tile'}-{c.type}-{c.d}-{c.rows}-{c.tokens}" for vec, c in CASES])
def test_upstream_attention(tree: Path, vec: bool, case: Attention) -> None:
    exact, cpu = case.exact(), case.cpu()
    assert error(cpu, exact) < 5e-4
    for schedule in SCHEDULES:
        y, _ = case.metal(tree, vec, nsg=(1, 2, 4, 1)[schedule] if vec else 1, schedule=schedule)
        assert error(y, cpu) < 5e-4  # test-backend-ops' limit
        assert error(y, exact) < 1e-6


def test_upstream_attention_relies_on_lockstep(tree: Path) -> None:
    with pytest.raises(emulator.EmulatorError, match="race: store of 16 bytes of threadgroup memory"):
        Attention("f16", 64, 4, 2, 67, 1).metal(tree, True, lockstep=False)
