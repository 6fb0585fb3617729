"""Capture of queries, keys and values: against the cache, against the attention's own output, and how it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import harness as h
import numpy as np
import pytest
import tiny
from harness import FA_OFF, Context, Model, Models, text

pytestmark = pytest.mark.skipif(not h.PATCHED, reason="needs the patched libraries")

if h.PATCHED:
    from seqkv_edge import llama
    from seqkv_edge.capture import N_WINDOW, Rows, capture, estimate_seconds, unrotate
    from seqkv_edge.errors import ModelError, UsageError

SERVED = [name for name, spec in tiny.SPECS.items() if spec.use != tiny.REFUSED]
REFUSED = [name for name, spec in tiny.SPECS.items() if spec.use == tiny.REFUSED]
SLIDING = {"gemma2": {0}, "gemma2-d256": {0}, "gemma3": {0, 1}, "cohere2": {0}, "sinks": {0}}
WITHOUT_ROPE = {"smollm3": {3}, "cohere2": {1, 2}}
N = 90  # tokens; more than a frame, less than the sliding windows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _interrupts_are_on() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which makes its children ignore SIGINT."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def copies(model: Model, *windows: list[int]) -> list[Rows]:
    """All rows of the windows, kept."""
    kept: list[Rows] = []

    def keep(r: Rows) -> None:
        kept.append(Rows(r.layer, r.q.copy(), r.k.copy(), r.v.copy(), None if r.x2 is None else r.x2.copy(), r.scale, r.softcap, r.freq, r.neox))

    capture(model.ptr, windows, keep)
    return kept


# -- what arrives


@pytest.mark.parametrize("name", SERVED)
def test_every_layer_with_full_attention(models: Models, name: str) -> None:
    spec = tiny.SPECS[name]
    layers = [il for il in range(spec.n_layer) if il not in SLIDING.get(name, ())]
    rows = copies(models(name), text(N), text(33, seed=1))
    assert [r.layer for r in rows] == layers * 2
    for i, r in enumerate(rows):
        n = N if i < len(layers) else 33
        assert r.q.shape == (n, spec.n_head, spec.head_dim)
        assert r.k.shape == r.v.shape == (n, spec.n_head_kv, spec.head_dim)
        assert r.q.dtype == r.k.dtype == r.v.dtype == np.float32
        assert len(r.freq) == (0 if r.layer in WITHOUT_ROPE.get(name, ()) else (spec.n_rot or spec.head_dim) // 2)
        assert r.softcap == spec.softcap


@pytest.mark.parametrize("name", SERVED)
def test_keys_and_values_are_those_of_the_cache(models: Models, name: str) -> None:
    """The state of an f16 cache holds one layer's rows in a row, token by token."""
    tokens = text(N)
    with Context(models(name), n_threads=os.cpu_count() or 1) as c:
        c.decode(tokens)
        state = c.save_seq()
    for r in copies(models(name), tokens):
        assert r.k.astype(np.float16).tobytes() in state
        assert r.v.astype(np.float16).tobytes() in state


def attention_outputs(model: Model, tokens: list[int]) -> dict[int, np.ndarray]:
    """By layer, f32 (n, n_head*head_dim): what the model's own attention gives, read from the node kqv_out."""
    lib, found = h.api._lib, {}
    name = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(("ggml_get_name", lib))
    n_bytes = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)(("ggml_nbytes", lib))
    get = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)(("ggml_backend_tensor_get", lib))

    @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    def read(tensor: int, ask: bool, _user: int | None) -> bool:
        node, _, layer = name(tensor).decode().partition("-")
        if node == "kqv_out" and not ask:
            out = np.empty((len(tokens), n_bytes(tensor) // 4 // len(tokens)), np.float32)
            get(tensor, out.ctypes.data, 0, out.nbytes)
            found[int(layer)] = out
        return node == "kqv_out" or not ask

    with Context(model, cb_eval=(read, None), n_threads=os.cpu_count() or 1) as c:
        c.decode(tokens)
    return found


def attend(r: Rows, q: np.ndarray, sinks: np.ndarray | None = None, slopes: np.ndarray | None = None) -> np.ndarray:
    """Causal attention in f64 from captured rows as an f16 cache holds them: (n, n_head*head_dim_v).

    sinks: (n_head,), scores of a sink of each head; slopes: (n_head,), of ALiBi.
    """
    n, group = len(q), q.shape[1] // r.k.shape[1]
    k, v = (np.repeat(x.astype(np.float16).astype(np.float64), group, axis=1) for x in (r.k, r.v))
    scores = np.einsum("ihd,jhd->hij", q.astype(np.float64), k) * r.scale
    if r.softcap:
        scores = r.softcap * np.tanh(scores / r.softcap)
    if slopes is not None:
        scores -= slopes[:, None, None] * np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
    if sinks is not None:
        scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))], axis=2)
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    return np.einsum("hij,jhd->ihd", p[:, :, :n], v).reshape(n, -1)


@pytest.mark.parametrize("name", SERVED)
def test_rows_give_the_attention_of_the_model(models: Models, name: str) -> None:
    tokens = text(N)
    outputs = attention_outputs(models(name), tokens)
    sinks = np.linspace(0.0, 4.0, tiny.SPECS[name].n_head) if name == "sinks" else None
    for r in copies(models(name), tokens):
        want = outputs[r.layer]

        def error(q: np.ndarray, r: Rows = r, want: np.ndarray = want) -> float:
            """relative to the size of the output"""
            return float(np.abs(attend(r, q, sinks) - want).max() / np.abs(want).max())

        assert error(r.q) < 2e-3
        # other queries are noticed: before RoPE, heads in another order
        if len(r.freq):
            assert error(unrotate(r.q, np.arange(N), r.freq, r.neox)) > 0.05
        assert error(r.q[:, ::-1]) > 0.05


def test_rows_that_lie_apart_in_memory(models: Models) -> None:
    """bloom has queries, keys and values of a token side by side in one tensor; the C functions alone capture it."""
    lib, model, tokens = llama.library().handle, models("bloom"), text(N)
    kept: list[Rows] = []

    @llama.RowsFunction
    def rows(_user: int | None, pointer: object) -> bool:
        c = pointer.contents
        q, k, v = (np.ctypeslib.as_array(x, (N, 2, 64)).copy() for x in (c.q, c.k, c.v))
        kept.append(Rows(c.il, q, k, v, None, c.scale, c.softcap, np.empty(0), False))
        return True

    collector = lib.llama_seqkv_collector_init(model.ptr, rows, None)
    try:
        with Context(model, cb_eval=(lib.llama_seqkv_collect, collector)) as c:
            c.decode(tokens)
            state = c.save_seq()
        assert lib.llama_seqkv_collector_finish(collector, None, 0) == N
    finally:
        lib.llama_seqkv_collector_free(collector)
    outputs = attention_outputs(model, tokens)
    assert [r.layer for r in kept] == [0, 1]
    for r in kept:
        assert r.k.astype(np.float16).tobytes() in state and r.v.astype(np.float16).tobytes() in state
        got, want = attend(r, r.q, slopes=np.array([2.0**-4, 2.0**-8])), outputs[r.layer]
        assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()


@pytest.mark.parametrize("name", [name for name in SERVED if name not in SLIDING])
def test_unrotated_keys_of_a_token_agree(models: Models, name: str) -> None:
    """The first layer's key before RoPE depends on the token alone, whatever its position and the RoPE scaling."""
    tokens = np.array(text(200))
    r = copies(models(name), list(tokens))[0]
    k = unrotate(r.k, np.arange(len(tokens)), r.freq, r.neox)
    size = np.abs(k).max()
    compared = 0
    for token in np.unique(tokens):
        same = k[tokens == token]
        compared += len(same) - 1
        assert np.abs(same - same[0]).max() < 2e-5 * size * np.sqrt(len(tokens))
    assert compared > 100
    rotated = [np.abs(r.k[tokens == token] - r.k[tokens == token][0]).max() for token in np.unique(tokens)]
    assert max(rotated) > 0.1 * size  # it had something to undo


def test_unrotate_pairs() -> None:
    x = np.arange(12, dtype=np.float64).reshape(2, 1, 6)  # two tokens, one head, the last two values not rotated
    freq, positions = np.array([0.5, 0.25]), np.array([3, -7])
    for neox, pairs in ((True, [(0, 2), (1, 3)]), (False, [(0, 1), (2, 3)])):
        out = unrotate(x, positions, freq, neox)
        for i, p in enumerate(positions):
            for (a, b), f in zip(pairs, freq):
                turned = complex(x[i, 0, a], x[i, 0, b]) * np.exp(-1j * p * f)
                assert out[i, 0, a] == pytest.approx(turned.real, abs=1e-12)
                assert out[i, 0, b] == pytest.approx(turned.imag, abs=1e-12)
        assert np.array_equal(out[..., 4:], x[..., 4:])
    assert unrotate(x.astype(np.float32), positions, freq, False).dtype == np.float32


def test_rows_do_not_depend_on_other_windows(models: Models) -> None:
    a, b = text(N), text(60, seed=1)
    alone, after = copies(models("llama"), b), copies(models("llama"), a, b)[2:]
    for x, y in zip(alone, after):
        assert np.abs(x.q - y.q).max() < 1e-4 and np.abs(x.k - y.k).max() < 1e-4 and np.abs(x.v - y.v).max() < 1e-4


def test_memory_is_that_of_one_layer(models: Models) -> None:
    """Every layer of every window arrives in the same place."""
    places: set[tuple[int, ...]] = set()

    def add(r: Rows) -> None:
        places.add(tuple(x.ctypes.data for x in (r.q, r.k, r.v)))
        assert not r.q.flags.writeable

    capture(models("llama-3l").ptr, [text(N, seed=i) for i in range(5)], add)
    assert len(places) == 1


# -- refusals


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_served(models: Models, name: str) -> None:
    with pytest.raises(ModelError, match="cannot serve this model"):
        capture(models(name).ptr, [text(20)], lambda _: pytest.fail("rows of a refused model"))


@pytest.mark.parametrize("windows", [[], [[]], [[1, 2], []]])
def test_no_tokens(models: Models, windows: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="at least one token"):
        capture(models("llama").ptr, windows, lambda _: None)


def test_wrong_token(models: Models) -> None:
    with pytest.raises(ModelError, match="llama_decode returned -1"):
        capture(models("llama").ptr, [[1, 10**6]], lambda _: None)


@pytest.mark.parametrize(
    ("name", "setup", "reason"),
    [
        ("llama", {"flash_attn": FA_OFF}, "use flash attention"),
        ("llama", {"kv": "q8_0"}, "its cache is quantized: use f16"),
        ("llama", {"kv": "q8_0:f16"}, "its cache is quantized: use f16"),
        ("deepseek2", {}, "the attention of layer 0 does not read values of its own"),
        ("mamba", {}, "no layer with full attention"),
        ("llama", {"n_seq": 2}, "do not belong to one sequence"),
    ],
)
def test_library_says_what_it_cannot_find(models: Models, name: str, setup: dict[str, object], reason: str) -> None:
    """The C functions by themselves, in contexts that `capture` does not make."""
    lib, model = llama.library().handle, models(name)
    calls = []

    @llama.RowsFunction
    def rows(_user: int | None, r: object) -> bool:
        calls.append(r.contents.il)
        return True

    collector = lib.llama_seqkv_collector_init(model.ptr, rows, None)
    err = ctypes.create_string_buffer(512)
    try:
        with Context(model, cb_eval=(lib.llama_seqkv_collect, collector), **setup) as c:
            c.decode(text(20), seq=[i % 2 for i in range(20)] if "n_seq" in setup else 0, pos=[i // 2 for i in range(20)])
        assert lib.llama_seqkv_collector_finish(collector, err, len(err)) < 0
    finally:
        lib.llama_seqkv_collector_free(collector)
    assert reason in err.value.decode() and "\n" not in err.value.decode()
    assert not calls


def test_library_notices_a_missing_layer(models: Models) -> None:
    lib, err, seen = llama.library().handle, ctypes.create_string_buffer(512), []

    @llama.RowsFunction
    def rows(_user: int | None, r: object) -> bool:
        seen.append(r.contents.il)
        return True

    @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    def first_layer_only(tensor: int, ask: bool, collector: int) -> bool:
        return not ask if seen else lib.llama_seqkv_collect(tensor, ask, collector)

    collector = lib.llama_seqkv_collector_init(models("llama").ptr, rows, None)
    try:
        with Context(models("llama"), cb_eval=(first_layer_only, collector)) as c:
            c.decode(text(20))
        assert seen == [0]
        assert lib.llama_seqkv_collector_finish(collector, err, len(err)) < 0
        assert "layer 1 was not found" in err.value.decode()
        assert lib.llama_seqkv_collector_n_layer(collector) == 2
        assert lib.llama_seqkv_collector_finish(collector, err, len(err)) < 0  # nothing was decoded
        assert "layer 0 was not found" in err.value.decode()
    finally:
        lib.llama_seqkv_collector_free(collector)
    assert not lib.llama_seqkv_collector_init(None, rows, None)


# -- how it ends


@pytest.mark.parametrize("error", [ValueError("no more"), KeyboardInterrupt(), SystemExit(3)])
def test_exception_stops_and_arrives_unchanged(models: Models, error: BaseException) -> None:
    seen: list[int] = []

    def stop(r: Rows) -> None:
        seen.append(r.layer)
        if len(seen) == 5:
            raise error

    with pytest.raises(type(error)) as info:
        capture(models("llama-3l").ptr, [text(N)] * 3, stop)
    assert info.value is error
    assert seen == [0, 1, 2, 0, 1]
    assert len(copies(models("llama-3l"), text(N))) == 3  # nothing is left over


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a process itself")
def test_interrupt_from_outside(models: Models) -> None:
    """ctrl-C arrives while the library computes; the handler is Python's own again afterwards."""
    calls = []
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            capture(models("llama-3l").ptr, [text(N)] * 100_000, lambda r: calls.append(r.layer))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert calls
    assert len(copies(models("llama-3l"), text(N))) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a process itself")
@pytest.mark.parametrize("nth", [1, 4, 6])
def test_interrupt_ends_with_the_layer(models: Models, nth: int) -> None:
    """Also in the last layer of all, and an error of the layer does not hide it."""
    calls = []

    def interrupt(r: Rows) -> None:
        calls.append(r.layer)
        if len(calls) == nth:
            signal.raise_signal(signal.SIGINT)
            raise ValueError

    with pytest.raises(KeyboardInterrupt):
        capture(models("llama-3l").ptr, [text(N)] * 2, interrupt)
    assert len(calls) == nth


def test_from_another_thread(models: Models) -> None:
    """Where signal handlers cannot be set."""
    found: list[Rows] = []
    thread = threading.Thread(target=lambda: found.extend(copies(models("llama"), text(N))))
    thread.start()
    thread.join()
    assert len(found) == 2


# -- time


def test_estimate_is_proportional(models: Models) -> None:
    one = min(estimate_seconds(models("llama").ptr, 1000, 128) for _ in range(5))
    many = min(estimate_seconds(models("llama").ptr, 1_000_000, 128) for _ in range(5))
    assert 0 < one < 60
    assert 100 * one < many < 10_000 * one


@pytest.mark.model
def test_default_model() -> None:
    """30 layers of 9 query heads and 3 KV heads; the time is near the estimate on a machine that does nothing else."""
    from seqkv_edge.engine import open_model
    from seqkv_edge.model import default_model

    n, layers = 256, []
    with open_model(default_model(), ngl=0) as loaded:
        assert loaded.pointer
        tokens = loaded.tokenize("The cache holds the keys and the values of the tokens. " * n, add_special=True, parse_special=False)
        estimate = estimate_seconds(loaded.pointer, n, n)
        start = time.perf_counter()

        def check(r: Rows) -> None:
            layers.append(r.layer)
            assert r.q.shape == (n, 9, 64) and r.k.shape == r.v.shape == (n, 3, 64)
            assert np.isfinite(r.q).all() and np.isfinite(r.k).all() and np.isfinite(r.v).all()

        capture(loaded.pointer, [tokens[:n]], check)
        seconds = time.perf_counter() - start
    assert layers == list(range(30))
    assert n < N_WINDOW and seconds / 8 < estimate < seconds * 8
