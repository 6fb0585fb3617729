"""Token ids in the bits that the model itself needs for them: an arithmetic coder with the model's own probabilities.

Both sides evaluate the tokens one at a time in a context of the same kind, so that the same machine with the same libraries gives the
same logits. They become integer frequencies, and the coder works with integers alone. A backend that does not reproduce the logits
decodes something else: a check byte after every 64 tokens notices (each with 255/256), and the hash of all tokens at the end.
`encode` decodes what it has written before it returns it.

Bytes: version 1 (u8), bytes of a context line (u8) and the line "KV n_ctx", model (16 bytes, its fingerprint), number of ids (u32), blake3 of the ids
(8 bytes), the coded ids.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .engine import Context, Model
from .errors import DamagedError, StoreError
from .gguf_meta import fingerprint
from .llama import KvSpec
from .tokens import digest

N_CTX = 2048
"""tokens of context; when it is full, its second half is evaluated again as a new beginning"""
KV = "f16"
"""cache of the contexts that code"""
_TOTAL = 1 << 30  # frequencies add up to about this
_CHECK = 64  # tokens between check bytes
_VERSION = 1
_TOP, _BOTTOM = 1 << 56, 1 << 48
Progress = Callable[[int], None]


def frequencies(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Cumulative frequencies (n_vocab + 1,) of the tokens: proportional to their probabilities, at least 1 each."""
    p = np.exp(logits.astype(np.float64) - float(logits.max()))
    counts = (p * (_TOTAL / p.sum())).astype(np.int64) + 1
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


class Encoder:
    """A range coder: 56 bits of range, carries resolved in the bytes written."""

    def __init__(self) -> None:
        self.low, self.range = 0, _TOP
        self.out = bytearray()

    def put(self, start: int, size: int, total: int) -> None:
        """A symbol that takes start..start+size-1 of 0..total-1."""
        step = self.range // total
        self.low += step * start
        self.range = step * size
        if self.low >= _TOP:
            self.low -= _TOP
            self._carry()
        while self.range < _BOTTOM:
            self.out.append(self.low >> 48)
            self.low = (self.low << 8) & (_TOP - 1)
            self.range <<= 8

    def _carry(self) -> None:
        i = len(self.out) - 1
        while self.out[i] == 255:
            self.out[i] = 0
            i -= 1
        self.out[i] += 1

    def finish(self) -> bytes:
        # the shortest value in low..low+range-1, read with zeros behind it
        for n in range(1, 8):
            unit = 1 << (56 - 8 * n)
            value = -(-self.low // unit) * unit
            if value < self.low + self.range:
                break
        if value >= _TOP:
            value -= _TOP
            self._carry()
        return bytes(self.out) + value.to_bytes(7, "big")[:n]


class Decoder:
    """The inverse of `Encoder`; any bytes decode to something."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.range = data, 7, _TOP
        self.code = int.from_bytes(data[:7].ljust(7, b"\0"), "big")

    def get(self, total: int) -> int:
        """The place in 0..total-1 that the next symbol covers."""
        self._step = self.range // total
        return min(total - 1, self.code // self._step)

    def take(self, start: int, size: int) -> None:
        """The symbol that `get` found covers start..start+size-1."""
        self.code = max(0, self.code - self._step * start)
        self.range = self._step * size
        while self.range < _BOTTOM:
            self.code = (self.code << 8 | (self.data[self.at] if self.at < len(self.data) else 0)) & (_TOP - 1)
            self.at += 1
            self.range <<= 8


def _check(tokens: Sequence[int]) -> int:
    return digest(tokens)[0]


def _distributions(context: Context) -> Iterator[NDArray[np.int64]]:
    """Cumulative frequencies of the next token, again and again; send() the token that came."""
    model = context.model
    bos = int(model.api.llama_vocab_bos(model.vocab))
    context.clear()
    context.evaluate([bos if bos >= 0 else 0])
    while True:
        token = yield frequencies(context.next_logits())
        if context.n_past == context.n_ctx:
            kept = context.tokens[context.n_ctx // 2 :]
            context.clear()
            context.evaluate(kept)
        context.evaluate([token])


def _new_context(model: Model, kv: str, n_ctx: int, threads: int | None) -> Context:
    return model.context(KvSpec.parse(kv), n_ctx=n_ctx, n_batch=min(512, n_ctx), threads=threads)


def encode(model: Model, tokens: Sequence[int], progress: Progress | None = None, *, threads: int | None = None) -> bytes:
    """Coded ids, decoded again and compared before they are returned. progress is called with the tokens done, of 2*len(tokens).

    Takes one evaluation of a single token each way. Raises StoreError: an id that the model does not have, or this machine does not
    give the same logits twice.
    """
    if not all(0 <= t < model.n_vocab for t in tokens):
        raise StoreError(f"the model {model.path.name} has {model.n_vocab:,} tokens: an id beyond cannot be coded with its probabilities")
    n_ctx = min(N_CTX, model.meta.n_ctx_train)
    coder = Encoder()
    with _new_context(model, KV, n_ctx, threads) as context:
        n_ctx = context.n_ctx
        source = _distributions(context)
        table = next(source)
        for i, token in enumerate(tokens):
            coder.put(int(table[token]), int(table[token + 1] - table[token]), int(table[-1]))
            if (i + 1) % _CHECK == 0:
                coder.put(_check(tokens[i + 1 - _CHECK : i + 1]), 1, 256)
            if i + 1 < len(tokens):
                table = source.send(token)
            if progress:
                progress(1)
    line = f"{KV} {n_ctx}".encode()
    head = struct.pack("<BB", _VERSION, len(line)) + line + bytes.fromhex(fingerprint(model.path))
    coded = head + struct.pack("<I", len(tokens)) + digest(tokens) + (coder.finish() if tokens else b"")
    if decode(model, coded, progress, threads=threads) != list(tokens):
        raise StoreError("the tokens do not survive coding with the model's probabilities: they were kept as they are")
    return coded


def decode(model: Model, data: bytes, progress: Progress | None = None, *, threads: int | None = None) -> list[int]:
    """The ids. Raises StoreError: coded with another model, or on a machine or backend whose probabilities are not this one's;
    DamagedError: not written by `encode`."""
    bad = DamagedError("tokens coded with a model's probabilities are damaged")
    if len(data) < 2 or data[0] != _VERSION:
        raise bad if len(data) < 2 else StoreError(f"coded tokens have version {data[0]}, this seqkv-edge knows {_VERSION}: upgrade it")
    at = 2 + data[1]
    if len(data) < at + 28:
        raise bad
    kv, _, n_ctx = data[2:at].decode("ascii", "replace").partition(" ")
    if data[at : at + 16].hex() != fingerprint(model.path):
        raise StoreError(f"these tokens were coded with the probabilities of another model than {model.path.name}")
    n, expected = struct.unpack("<I8s", data[at + 16 : at + 28])
    # a check byte after 64 tokens is the least that they cost
    if kv != KV or not n_ctx.isdigit() or not 0 < int(n_ctx) <= N_CTX + 256 or n > (len(data) - at - 28 + 8) * 64:
        raise bad
    coder = Decoder(data[at + 28 :])
    tokens: list[int] = []
    other = StoreError(
        "these tokens cannot be decoded here: the probabilities are not those they were coded with (another backend, machine or version of "
        "the libraries), or the bytes are damaged"
    )
    if n == 0:
        return tokens
    with _new_context(model, kv, int(n_ctx), threads) as context:
        source = _distributions(context)
        table = next(source)
        for i in range(n):
            place = coder.get(int(table[-1]))
            token = int(np.searchsorted(table, place, "right")) - 1
            coder.take(int(table[token]), int(table[token + 1] - table[token]))
            tokens.append(token)
            if (i + 1) % _CHECK == 0:
                check = coder.get(256)
                if check != _check(tokens[-_CHECK:]):
                    raise other
                coder.take(check, 1)
            if i + 1 < n:
                table = source.send(token)
            if progress:
                progress(1)
    if digest(tokens) != expected:
        raise other
    return tokens
