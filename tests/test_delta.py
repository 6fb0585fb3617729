"""The lossless coder of blocks: what goes in comes out, on any input; what does not belong is refused; what it is worth."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqkv_edge import SeqkvError, codec, delta
from seqkv_edge.delta import COPY_CLASSES, FRAME, GAIN_TERMS, MATCHES, Coder, Frame, Layer, Predictor, Rows

ROOT = Path(__file__).resolve().parents[1]


def integers(seed: int, low: int, high: int, *shape: int) -> np.ndarray:
    """The same on every machine: low..high-1 from a linear congruential generator (Numerical Recipes)."""
    n = int(np.prod(shape))
    state, out = seed & 0xFFFFFFFF, np.empty(n, np.int64)
    for i in range(n):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out[i] = low + (state >> 8) % (high - low)
    return out.reshape(shape)


def make_layer(seed: int, heads: int, dk: int, dv: int, n_rot: int, neox: bool, prev: Layer | None, *, rng: bool = True) -> Layer:
    """A layer with transforms and predictors of no meaning."""
    r = np.random.RandomState(seed)
    draw = (lambda low, high, *shape: r.randint(low, high, shape)) if rng else lambda low, high, *shape: integers(seed, low, high, *shape)
    enc = (draw(-128, 128, heads, dk, dk) / 256 + 8 * np.eye(dk)).astype(np.float16)
    angle = np.arange(FRAME)[:, None] / (1.0 + np.arange(n_rot // 2))
    rope = np.rint(np.stack([np.cos(angle), np.sin(angle)], axis=-1).reshape(FRAME, n_rot) * 16384).astype(np.int16)
    layer = delta.make_layer(enc, dv, rope, neox, draw(100, 150, heads).astype(np.uint8))

    def predictor(n: int, inputs: int, groups: int) -> Predictor:
        gain = draw(-100, 100, groups, GAIN_TERMS).astype(np.int32)
        gain[:, 0] = draw(2000, 4000, groups)
        return Predictor(
            draw(-3, 4, n, inputs).astype(np.int8) if inputs else None, draw(0, 3000, n).astype(np.uint16),
            draw(90, 160, n).astype(np.uint8), draw(0, 129, COPY_CLASSES).astype(np.uint8),
            draw(-128, 128, COPY_CLASSES).astype(np.int8), draw(-30, 30, COPY_CLASSES).astype(np.int8), gain,
        )  # fmt: skip

    n_prev = prev.n_k + prev.n_v if prev else 0
    k_groups, v_groups = layer.n_k // 64 * 3, layer.n_v // 64
    levels = {}
    for level, past in (("fast", 0), ("small", n_prev)):
        levels[level] = (predictor(layer.n_k, past, k_groups), predictor(layer.n_v, past + layer.n_k, v_groups))
    return replace(layer, predictors=levels)


def make_rows(seed: int, coder: Coder, n: int, *, rng: bool = True) -> Rows:
    """Random bytes as blocks, the reserved bit of keys clear."""
    r = np.random.RandomState(seed)
    k, v = [], []
    for i, (layer, kb, vb) in enumerate(zip(coder.layers, coder.k_bits, coder.v_bits)):
        for out, width, salt in zip((k, v), layer.rows(kb, vb), (0, 1)):
            draw = r.randint(0, 256, (n, width)) if rng else integers(seed + 2 * i + salt, 0, 256, n, width)
            out.append(draw.astype(np.uint8))
        k[-1].reshape(-1, codec.block_bytes(kb, graded=True))[:, 1] &= 0x7F
    return Rows(k, v)


def empty(rows: Rows) -> Rows:
    return Rows([np.zeros_like(a) for a in rows.k], [np.zeros_like(a) for a in rows.v])


def equal(a: Rows, b: Rows) -> bool:
    return all(np.array_equal(x, y) for x, y in zip([*a.k, *a.v], [*b.k, *b.v]))


def frames_of(tokens: list[int], offset: np.ndarray | None = None) -> list[Frame]:
    return delta.frames(tokens, (np.arange(len(tokens)) % FRAME).astype(np.uint8) if offset is None else offset)


def small_coder(seed: int = 1, *, rng: bool = True) -> Coder:
    layers: list[Layer] = []
    for i in range(3):
        layers.append(make_layer(seed + i, 2, 64, 64, 64, False, layers[-1] if layers else None, rng=rng))
    return Coder(layers, (3, 2, 4), (3, 4, 1))


# -- tables


def test_tables_are_what_their_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("make_entropy_tables", ROOT / "tools" / "make_entropy_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.render() == (ROOT / "native" / "entropy_tables.h").read_text()


# -- round trips


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**31), st.integers(1, 3), st.sampled_from([64, 128]), st.sampled_from([64, 128]), st.sampled_from([0, 32, 64]),
    st.booleans(), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=2), st.integers(1, 140), st.integers(2, 9),
)  # fmt: skip
def test_any_blocks_come_back(seed, heads, dk, dv, n_rot, neox, bits, n, vocabulary) -> None:
    first = make_layer(seed, heads, dk, dv, n_rot, neox, None)
    coder = Coder([first, make_layer(seed + 1, heads, dk, dv, n_rot, neox, first)], [b[0] for b in bits], [b[1] for b in bits])
    rows = make_rows(seed, coder, n)
    r = np.random.RandomState(seed)
    frames = frames_of(r.randint(0, vocabulary, n).tolist(), r.randint(0, 64, n).astype(np.uint8))
    for level in delta.LEVELS:
        data = [coder.encode(level, frame, rows) for frame in frames]
        back = empty(rows)
        coder.decode_path(data, frames, back, threads=2)
        assert equal(rows, back)
        again = empty(rows)
        for d, frame in zip(data, frames):
            coder.decode(d, frame, again)
        assert equal(rows, again)


def test_head_dims_of_256_and_layers_of_other_shapes() -> None:
    a = make_layer(1, 1, 256, 128, 128, True, None)
    b = make_layer(2, 2, 64, 256, 0, False, a)
    coder = Coder([a, b], (1, 4), (2, 3))
    rows, frames = make_rows(3, coder, 70), frames_of(list(range(35)) * 2)
    back = empty(rows)
    coder.decode_path([coder.encode("small", f, rows) for f in frames], frames, back)
    assert equal(rows, back)


def test_golden_bytes() -> None:
    """The bytes of the format, on every machine: integers from a generator of our own, no library's floats but E's inverse."""
    coder = small_coder(rng=False)
    rows, frames = make_rows(9, coder, 70, rng=False), frames_of(integers(4, 0, 5, 70).tolist())
    found = {level: hashlib.sha256(b"".join(coder.encode(level, f, rows) for f in frames)).hexdigest() for level in delta.LEVELS}
    found["transform"] = hashlib.sha256(b"".join(x.k_encode.tobytes() + x.k_decode.tobytes() for x in coder.layers)).hexdigest()
    golden = dict(line.split() for line in (ROOT / "tests" / "golden" / "delta.txt").read_text().splitlines())
    assert found == golden


def test_blocks_with_the_reserved_bit_are_refused() -> None:
    coder = small_coder()
    rows, frames = make_rows(1, coder, 3), frames_of([1, 2, 3])
    rows.k[1][2, 1] |= 0x80
    with pytest.raises(SeqkvError):
        coder.encode("fast", frames[0], rows)


# -- a decoder written from format.md, in Python's integers


class Reference:
    """Decodes one layer of a frame, given the inputs of the tokens and of those they copy."""

    def __init__(self, layer: Layer, data: bytes) -> None:
        text = (ROOT / "native" / "entropy_tables.h").read_text() + (ROOT / "native" / "tables.h").read_text()
        arrays = re.findall(r"u?int\d+_t (\w+)\[\d+\] = \{([^}]*)\}", text)
        self.table = {name: [int(x, 0) for x in body.split(",") if x.strip()] for name, body in arrays}
        self.layer = layer
        words = np.frombuffer(data, "<u2").tolist()
        self.states = [words[2 * i] | words[2 * i + 1] << 16 for i in range(8)]
        self.words, self.count = words[16:], 0

    def exp2(self, s: int, x: int) -> int:
        return s * self.table["seqkv_exp2_table"][x + 288] >> 16

    def symbol(self, a: int, b: int, edges: list[int]) -> int:
        """edges: of symbols 1, 2, ..."""
        x = self.states[self.count % 8]
        begins = [0] + [self.table["seqkv_cdf"][cut((a * e - b) >> 12, -512, 511) + 512] + j for j, e in enumerate(edges, 1)] + [1 << 15]
        j = max(i for i, begin in enumerate(begins[:-1]) if begin <= x % 32768)
        y = (begins[j + 1] - begins[j]) * (x >> 15) + x % 32768 - begins[j]
        self.states[self.count % 8] = y if y >= 1 << 16 else y << 16 | self.words.pop(0)
        self.count += 1
        return j

    def predict(self, p: Predictor, inputs: np.ndarray) -> np.ndarray:
        if p.weight is None or inputs.shape[1] == 0:
            return np.zeros((len(inputs), len(p.step)), np.int64)
        return np.clip((inputs.astype(np.int64) @ p.weight.astype(np.int64).T * p.step + (1 << 15)) >> 16, -4095, 4095)

    def mix(self, p: Predictor, match: np.ndarray, predicted: np.ndarray, copy: np.ndarray, own: np.ndarray) -> np.ndarray:
        share, error = (a.astype(np.int64)[match][:, None] for a in (p.copy, p.copy_error))
        mixed = np.clip(predicted + ((share * (copy - predicted) + error * (copy - own) + 64) >> 7), -4095, 4095)
        return np.where(match[:, None] > 0, mixed, predicted)

    def turn(self, x: np.ndarray, offset: np.ndarray) -> np.ndarray:
        n, half = len(x), self.layer.rope.shape[1] // 2
        x = x.reshape(n, self.layer.n_head, self.layer.dk)
        first, second = (slice(half), slice(half, 2 * half)) if self.layer.neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        cos, sin = (self.layer.rope[offset][:, None, i::2].astype(np.int64) for i in (0, 1))
        y = x.copy()
        y[..., first] = (x[..., first] * cos - x[..., second] * sin + (1 << 13)) >> 14
        y[..., second] = (x[..., first] * sin + x[..., second] * cos + (1 << 13)) >> 14
        shift = self.layer.k_shift.astype(np.int64)[None, :, None]
        z = (np.einsum("hij,nhj->nhi", self.layer.k_encode.astype(np.int64), y) + (1 << shift >> 1)) >> shift
        return np.clip(z, -4095, 4095).reshape(n, -1)

    def gains(self, p: Predictor, match: np.ndarray, last: list[int] | None, copies: list[list[int] | None], prev: list[list[int]] | None,
              head_groups: int, graded: bool) -> list[list[int]]:  # fmt: skip
        out: list[list[int]] = []
        for t, m in enumerate(match):
            row: list[int] = []
            for q, k in enumerate(p.gain.tolist()):
                usual = p.gain[:, 0].tolist()
                expected = 256 * k[0] + (k[1] * (256 * last[q] - k[0]) if last else 0)
                if copies[t]:
                    term = k[2] * (256 * copies[t][q] - k[0]) * int(p.copy[m])
                    expected += abs(term) // 128 * (1 if term >= 0 else -1)
                expected += k[3] * (256 * row[q - head_groups] - usual[q - head_groups]) if q >= head_groups else 0
                expected += k[4] * (256 * row[q - 1] - usual[q - 1]) if graded and q % 3 else 0
                expected += k[5] * (256 * prev[t][q] - k[7]) if prev and q < len(prev[t]) else 0
                a = self.exp2(4096, 240 - k[6])
                b = (cut(expected, 0, (1 << 24) - 1) >> 8) * a >> 7
                row.append(self.symbol(a, b, [2 * j - 1 for j in range(1, 32 if graded else 256)]))
            out.append(row)
            last = row
        return out

    def codes(self, p: Predictor, match: np.ndarray, gains: list[list[int]], z: np.ndarray, bits: int, graded: bool) -> np.ndarray:
        """(n, values)"""
        groups = [(0, bits + 2), (1, bits), (2, bits - 1), (2, bits - 1)] if graded else [(0, bits)] * 4
        n, width = z.shape
        per_row, per_block = width // 64, 3 if graded else 1
        out = np.zeros((n * per_row, 64), np.int64)
        for start in range(0, n * per_row, 8):
            lanes = range(start, min(start + 8, n * per_row))
            total, path = dict.fromkeys(lanes, 0), {}
            for i in range(64):
                group, b = groups[i // 16]
                for lane in lanes if b else ():
                    if i in ((0, 16, 32) if graded else (0,)):
                        path[lane] = [0, 0, 0]
                    t, block = divmod(lane, per_row)
                    unit = 12 if graded else int(self.layer.v_gain[block // (self.layer.dv // 64)])
                    log = cut((max(gains[t][block * per_block + group], 1) - unit) * (16 if graded else 12), -288, 288)
                    spread = 3 * (int(p.spread[block * 64 + i]) - 128) + log // 2 + 3 * int(p.copy_spread[match[t]])
                    spread = cut(spread + self.table["seqkv_log_sum"][(total[lane] + 384) >> 3] - self.table["seqkv_log_count"][i], -288, 288)
                    a = self.exp2(self.table["seqkv_scale17"][b], cut(log - spread, -144, 384))
                    c = int(z[t, block * 64 + i]) * self.exp2(2048, -spread)
                    levels = self.table[f"seqkv_level{b}"]
                    reachable = levels[path[lane][1] :: 2]
                    index = 2 * self.symbol(a, c, [x + y for x, y in zip(reachable, reachable[1:])]) + path[lane][1]
                    u = (index >> 1 & 1) ^ path[lane][0] ^ path[lane][2]
                    path[lane] = [u, *path[lane][:2]]
                    out[lane, i] = index >> 2 << 1 | u
                    total[lane] += min(abs(cut((a * 2 * levels[index] - c) >> 12, -512, 511)), 192)
        return out.reshape(n, width)


def cut(x: int, low: int, high: int) -> int:
    return min(max(int(x), low), high)


@pytest.mark.parametrize("level", delta.LEVELS)
def test_the_format_is_what_its_document_says(level: delta.Level) -> None:
    coder = small_coder(5)
    rows, frames = make_rows(7, coder, FRAME + 9), frames_of([1, 2, 3, 1, 4] * 14 + [5, 2, 1])
    frame, i, past, end = frames[1], 1, FRAME, FRAME + 9
    reader = Reference(coder.layers[i], coder.encode_layer(level, i, frame, rows))
    assert 0 < (frame.match > 0).sum() < 9
    source = np.where(frame.match > 0, frame.source, 0)

    def unpacked(which: str, layer: int) -> tuple[np.ndarray, list[list[int]]]:
        graded = which == "k"
        bits, data = (coder.k_bits if graded else coder.v_bits)[layer], (rows.k if graded else rows.v)[layer]
        codes, gains = codec.unpack(bits, data.reshape(-1), graded=graded)
        return codes.reshape(end, -1), gains[:, : 3 if graded else 1].reshape(end, -1).tolist()

    x, z = (a.astype(np.int64) for a in coder.layers[i].inputs(coder.k_bits[i], coder.v_bits[i], frame.offset, rows.k[i], rows.v[i]))
    before = [np.zeros((end, 0), np.int64)]
    if level == "small":
        before = list(coder.layers[0].inputs(coder.k_bits[0], coder.v_bits[0], frame.offset, rows.k[0], rows.v[0]))
    inputs = np.concatenate([*before, x], axis=1)
    n_prev = inputs.shape[1] - x.shape[1]
    for which, p, values, width, head_groups in zip("kv", coder.layers[i].predictors[level], (x, z), (n_prev, inputs.shape[1]), (3, 1)):
        codes, gains = unpacked(which, i)
        copies = [gains[s] if m else None for s, m in zip(source, frame.match)]
        prev = unpacked(which, 0)[1][past:] if level == "small" else None
        found = reader.gains(p, frame.match, gains[past - 1], copies, prev, head_groups, which == "k")
        assert found == gains[past:]
        own = reader.predict(p, inputs[:, :width])
        mean = reader.mix(p, frame.match, own[past:], values[source], own[source])
        if which == "k":
            mean = reader.turn(mean, frame.offset[past:])
        bits = (coder.k_bits if which == "k" else coder.v_bits)[i]
        assert np.array_equal(reader.codes(p, frame.match, found, mean, bits, which == "k"), codes[past:])
    assert not reader.words and reader.states == [1 << 16] * 8


# -- damage


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_bytes_are_refused_or_seen_in_the_blocks(data) -> None:
    coder = small_coder()
    rows, frames = make_rows(1, coder, 5), frames_of([1, 2, 3, 1, 2])
    coded = bytearray(coder.encode(data.draw(st.sampled_from(delta.LEVELS)), frames[0], rows))
    kind = data.draw(st.integers(0, 2))
    if kind == 0:
        coded[data.draw(st.integers(0, len(coded) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == 1:
        del coded[data.draw(st.integers(0, len(coded) - 1)) :]
    else:
        coded += data.draw(st.binary(min_size=1, max_size=5))
    back = empty(rows)
    try:
        coder.decode(bytes(coded), frames[0], back)
    except SeqkvError:
        return
    assert not equal(rows, back)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=600), st.integers(1, 5))
def test_any_bytes_may_be_decoded(data, n) -> None:
    coder, frame = small_coder(), frames_of([1] * n)[0]
    rows = make_rows(1, coder, n)
    for i in range(3):
        with pytest.raises(SeqkvError):
            coder.decode_layer("small", i, frame, rows, data)


def test_contexts_that_cannot_be_are_refused() -> None:
    coder = small_coder()
    rows, frame = make_rows(1, coder, 70), frames_of([1, 2, 3] * 23 + [1])[1]
    data = coder.encode("fast", frame, rows)
    for wrong in (
        {"source": np.full_like(frame.source, 64), "match": np.ones_like(frame.match)},
        {"source": np.full_like(frame.source, -1), "match": np.ones_like(frame.match)},
        {"match": np.full_like(frame.match, 7)},
        {"offset": np.full_like(frame.offset, 64)},
    ):
        with pytest.raises(SeqkvError):
            coder.decode(data, replace(frame, **wrong), empty(rows))
    with pytest.raises(SeqkvError):
        coder.decode(data, frame, Rows([a[:69] for a in rows.k], rows.v))
    assert [f.start for f in delta.frames([1] * 200, np.zeros(200, np.uint8), 128)] == [128, 192]
    with pytest.raises(SeqkvError):
        delta.frames([1] * 70, np.zeros(70, np.uint8), 60)
    with pytest.raises(SeqkvError):
        Frame(0, np.zeros(3, np.uint8), np.zeros(2, np.int32), np.zeros(2, np.uint8))


def test_an_error_ends_all_threads() -> None:
    coder = small_coder()
    rows, frames = make_rows(1, coder, 300), frames_of([1, 2, 3] * 100)
    data = [coder.encode("small", f, rows) for f in frames]
    data[1] = data[1][:-1] + bytes([data[1][-1] ^ 255])
    with pytest.raises(SeqkvError):
        coder.decode_path(data, frames, empty(rows), threads=3)


# -- parts


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-127, 127), min_size=1, max_size=400), st.binary(max_size=300))
def test_weights_come_back(weights, noise) -> None:
    w = np.array(weights, np.int8)
    data = delta.weights_to_bytes(w)
    assert np.array_equal(delta.weights_from_bytes(data, w.shape), w)
    for hostile in (noise, data[:-2].tobytes(), data.tobytes() + b"\0\0"):
        with pytest.raises(SeqkvError):
            delta.weights_from_bytes(np.frombuffer(hostile, np.uint8), w.shape)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=300))
def test_copies_are_the_longest_matches(tokens) -> None:
    frames = frames_of(tokens)
    for frame in frames:
        for i in range(len(frame.source)):
            t = frame.start + i
            longest = {}
            for s in range(frame.start):
                m = 0
                while m < MATCHES[-1] and m <= s and tokens[s - m] == tokens[t - m]:
                    m += 1
                longest[s] = sum(m >= x for x in MATCHES)
            best = max(longest.values(), default=0)
            assert frame.match[i] == best
            assert best == 0 or frame.source[i] == max(s for s, c in longest.items() if c == best)


@pytest.mark.parametrize("neox", [False, True])
def test_transforms_are_each_others_inverses(neox: bool) -> None:
    r = np.random.RandomState(3)
    layer = delta.make_layer(r.standard_normal((2, 64, 64)).astype(np.float16), 64, delta.rope_table(0.3 ** np.arange(16)), neox, np.full(2, 128))
    for h in range(2):
        product = layer.k_encode[h] / 2.0 ** layer.k_shift[h] @ (layer.k_decode[h] / 8192.0)
        assert np.abs(product - np.eye(64)).max() < 0.05
    with pytest.raises(SeqkvError):
        delta.make_layer(np.zeros((1, 64, 64)), 64, delta.rope_table(np.ones(4)), neox, np.full(1, 128))


def test_products_with_vectors_are_the_plain_ones(tmp_path: Path) -> None:
    """tests/products.c: what this processor has, of AVX2 and AVX-512 VNNI, each by itself."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path / "products"
    subprocess.run([compiler, "-std=c11", "-O1", f"-I{ROOT / 'native'}", str(ROOT / "tests" / "products.c"), "-lm", "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    flags_of = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and flags_of.exists():
        has = flags_of.read_text().split()
        assert int(done.stdout) == ("avx2" in has) + ("avx512_vnni" in has)  # none was left out


def test_a_frame_of_the_fuzzer(tmp_path: Path) -> None:
    """tests/fuzz/delta.c with the sanitizers, on a few pseudorandom inputs."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    sources = [ROOT / "native" / f"{name}.c" for name in ("delta", "predict", "entropy", "quantize", "transform")]
    program = tmp_path / "fuzz"
    flags = ["-std=c11", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DSTANDALONE"]
    command = [compiler, *flags, f"-I{ROOT / 'native'}", str(ROOT / "tests" / "fuzz" / "delta.c"), *map(str, sources), "-lm", "-o", str(program)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("the compiler has no sanitizers")
    done = subprocess.run([str(program), "60"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# -- the shipped predictors


@pytest.mark.model
def test_shipped_predictors_on_text_of_other_kinds() -> None:
    """Ratios to the live bytes of the first 320 tokens of a session, which have little to copy from, and of their second copy."""
    from seqkv_edge import capture, model, predictor, profile
    from seqkv_edge.engine import open_model

    try:
        path = Path(model.default_model())
    except SeqkvError as error:
        pytest.skip(str(error))
    shipped = ROOT / "models" / "SmolLM2-135M-Instruct.seqkv.gguf"
    assert shipped.stat().st_size < 2_000_000
    coder = delta.read(shipped, "seqkv3")
    assert coder is not None and len(coder.layers) == 30
    designs = {d.layer: d for d in profile.read_designs(shipped)[0]}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    k: dict[int, np.ndarray] = {}
    v: dict[int, np.ndarray] = {}

    def on_layer(rows: capture.Rows) -> None:
        i = rows.layer
        k[i], v[i] = predictor.blocks(rows, designs[i], coder.k_bits[i], coder.v_bits[i])

    with open_model(path) as loaded:
        tokens = loaded.tokenize(text, add_special=True, parse_special=False)[:320]
        tokens = tokens + tokens
        capture.capture(loaded.pointer, [tokens], on_layer, progress=False)
    rows = Rows([k[i] for i in sorted(k)], [v[i] for i in sorted(v)])
    frames = frames_of(tokens)
    live = sum(a.shape[1] for a in [*rows.k, *rows.v]) * FRAME
    for level, first, second in (("small", 0.77, 0.6), ("fast", 0.9, 0.62)):
        data = [coder.encode(level, frame, rows) for frame in frames]
        back = empty(rows)
        coder.decode_path(data, frames, back)
        assert equal(rows, back)
        sizes = np.array([len(d) for d in data]) / live
        assert sizes[:5].mean() < first and sizes[5:].mean() < second, (level, sizes)


def write_profile(path: Path) -> None:
    """What `small_coder` is made from, without predictors."""
    from gguf import GGUFWriter

    from seqkv_edge import profile

    writer = GGUFWriter(str(path), profile.PROFILE_ARCHITECTURE)
    writer.add_uint32("seqkv.profile.version", profile.VERSION)
    writer.add_uint32("seqkv.profile.n_layer", 4)
    writer.add_array("seqkv.profile.seqkv3.k_bits", [3, 2, 4, 0])
    writer.add_array("seqkv.profile.seqkv3.v_bits", [3, 4, 1, 0])
    for i in range(3):
        r = np.random.RandomState(1 + i)
        writer.add_tensor(f"blk.{i}.k_encode", (r.randint(-128, 128, (2, 64, 64)) / 256 + 8 * np.eye(64)).astype(np.float16))
        writer.add_tensor(f"blk.{i}.v_scale", np.ones((2, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_predictors_are_added_to_a_profile_and_read(tmp_path: Path) -> None:
    from gguf import GGUFReader

    from seqkv_edge import profile

    coder, path = small_coder(), tmp_path / "p.gguf"
    write_profile(path)
    assert delta.read(path, "seqkv3") is None
    for _ in range(2):  # the second time in place of the first
        profile.add_predictors(path, dict(enumerate(coder.layers)))
    names = [t.name for t in GGUFReader(path).tensors]
    assert len(names) == len(set(names)) and "blk.2.v_scale" in names
    there = delta.read(path, "seqkv3")
    assert (there.k_bits, there.v_bits, there.index) == (coder.k_bits, coder.v_bits, (0, 1, 2))
    assert delta.read(path, "seqkv3", "seqkv2").v_bits == (2, 2, 2)
    rows, frames = make_rows(5, coder, 100), frames_of([1, 2] * 50)
    for level in delta.LEVELS:
        assert [there.encode(level, f, rows) for f in frames] == [coder.encode(level, f, rows) for f in frames]
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 2, len(data), 997):  # a damaged file is an error or other predictors, never a crash
        data[at] ^= 0x55
        path.write_bytes(data)
        try:
            delta.read(path, "seqkv3")
        except SeqkvError:
            pass
        data[at] ^= 0x55
