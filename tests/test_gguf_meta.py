"""The GGUF header reader: what it finds in good files, and that it refuses hostile ones with one line."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqkv_edge.errors import ModelError
from seqkv_edge.gguf_meta import Skipped, fingerprint, read_header, read_model


def test_model_metadata(make_gguf):
    meta = read_model(make_gguf())
    assert (meta.arch, meta.name, meta.n_layer, meta.n_ctx_train, meta.n_vocab) == (
        "llama",
        "a small model",
        4,
        8192,
        1000,
    )
    assert [(x.k_values, x.v_values, x.window) for x in meta.layers] == [(128, 128, 0)] * 4
    assert meta.weight_bytes == 4096 * 4
    assert meta.chat_template is None


def test_layers_that_differ(make_gguf):
    path = make_gguf(attention__head_count_kv=[2, 0, 1, 4], attention__key_length=128, attention__value_length=64)
    assert [(x.k_values, x.v_values) for x in read_model(path).layers] == [(256, 128), (0, 0), (128, 64), (512, 256)]


@pytest.mark.parametrize(
    ("arch", "pattern", "expected"),
    [
        ("gemma2", None, [512, 0, 512, 0]),
        ("llama", [True, False, False, True], [512, 0, 0, 512]),
        ("unheard-of", None, [0, 0, 0, 0]),
        ("smallthinker", None, [0, 512, 512, 512]),
    ],
)
def test_sliding_windows(make_gguf, arch, pattern, expected):
    path = make_gguf(arch=arch, attention__sliding_window=512, attention__sliding_window_pattern=pattern)
    assert [layer.window for layer in read_model(path).layers] == expected


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"block_count": None}, "block_count"),
        ({"block_count": 0}, "no layers"),
        ({"block_count": 1 << 30}, "block_count"),
        ({"attention__head_count": None}, "head_count"),
        ({"attention__head_count_kv": [1, 2]}, "head_count_kv"),
        ({"context_length": "many"}, "context_length"),
    ],
)
def test_nonsense_metadata(make_gguf, fields, word):
    with pytest.raises(ModelError, match=word):
        read_model(make_gguf(**fields))


def test_a_profile_is_not_a_model(make_gguf):
    with pytest.raises(ModelError, match="is a profile, not a model"):
        read_model(make_gguf(arch="seqkv-profile"))


def test_not_a_model_file(tmp_path: Path):
    with pytest.raises(ModelError, match="no file"):
        read_header(tmp_path / "missing.gguf")
    with pytest.raises(ModelError, match=r"directory|cannot read"):
        read_header(tmp_path)
    empty = tmp_path / "empty.gguf"
    empty.write_bytes(b"")
    with pytest.raises(ModelError, match="not a GGUF file"):
        read_header(empty)
    empty.write_text("hello, this is text")
    with pytest.raises(ModelError, match="not a GGUF file"):
        read_header(empty)


def test_every_truncation_is_refused(make_gguf):
    path = make_gguf()
    data = path.read_bytes()
    cut = path.with_name("cut.gguf")
    start = read_header(path).data_start
    for n in [*range(4, start, 7), start, len(data) - 32 * 1024 // 4, len(data) - 1]:
        cut.write_bytes(data[:n])
        with pytest.raises(ModelError, match=r"truncated|damaged"):
            read_header(cut)


def _file(body: bytes, n_tensors: int = 0, n_fields: int = 1, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields) + body


def _key(key: bytes, kind: int) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind)


HOSTILE = {
    "key longer than the file": _file(struct.pack("<Q", 1 << 62)),
    "key of 2^64-1 bytes": _file(struct.pack("<Q", (1 << 64) - 1)),
    "string longer than the file": _file(_key(b"a", 8) + struct.pack("<Q", 1 << 40)),
    "array of 2^61 numbers": _file(_key(b"a", 9) + struct.pack("<IQ", 10, 1 << 61)),
    "array of 2^60 strings": _file(_key(b"a", 9) + struct.pack("<IQ", 8, 1 << 60)),
    "array in an array": _file(_key(b"a", 9) + struct.pack("<IQ", 9, 1)),
    "unknown type": _file(_key(b"a", 99) + bytes(64)),
    "2^60 fields": _file(b"", n_fields=1 << 60),
    "2^60 tensors": _file(b"", n_tensors=1 << 60, n_fields=0),
    "repeated key": _file(_key(b"a", 4) + bytes(4) + _key(b"a", 4) + bytes(4), n_fields=2),
    "alignment 3": _file(_key(b"general.alignment", 4) + struct.pack("<I", 3)),
    "alignment 0": _file(_key(b"general.alignment", 4) + struct.pack("<I", 0)),
    "tensor of 9 dimensions": _file(_key(b"t", 9) + bytes(120), n_tensors=1, n_fields=0),
    "tensor beyond the file": _file(_key(b"t", 1) + struct.pack("<QIQ", 1 << 60, 0, 0), n_tensors=1, n_fields=0),
    "version 1": _file(b"", n_fields=0, version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files(tmp_path: Path, data: bytes):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data + bytes(64))
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(4, 400), st.binary(min_size=1, max_size=8))
def test_changed_bytes_never_crash(make_gguf, offset, junk):
    path = make_gguf("base.gguf")
    data = bytearray(path.read_bytes())
    data[offset : offset + len(junk)] = junk
    path.write_bytes(data)
    try:
        read_model(path)
    except ModelError as error:
        assert "\n" not in str(error)


def test_long_values_are_skipped(make_gguf):
    path = make_gguf(long=[f"token {i}" for i in range(20000)], big="x" * (2 << 20))
    fields = read_header(path).fields
    assert fields["llama.long"] == Skipped(20000)
    assert fields["llama.big"] == Skipped(2 << 20)


def test_fingerprint(make_gguf):
    path = make_gguf()
    first = fingerprint(path)
    assert len(first) == 32 and int(first, 16) >= 0
    assert fingerprint(path) == first
    data = bytearray(path.read_bytes())
    start = read_header(path).data_start
    for offset in (8, start, start + 8192):  # header, start and middle of the tensor
        changed = path.with_name("changed.gguf")
        copy = bytearray(data)
        copy[offset] ^= 1
        changed.write_bytes(copy)
        if offset != 8:
            assert fingerprint(changed) != first
    path.write_bytes(data + b"\0")
    assert fingerprint(path) != first


def test_fingerprint_is_what_the_format_says(make_gguf):
    from blake3 import blake3

    path = make_gguf(tensors={"t": np.arange(3000, dtype=np.float32)})
    header, data = read_header(path), path.read_bytes()
    tensor = data[header.data_start : header.data_start + 12000]
    expected = struct.pack("<Q", len(data)) + data[: header.data_start] + tensor[:4096] + tensor[6000 : 6000 + 4096]
    assert fingerprint(path) == blake3(expected).hexdigest(length=16)
