"""A live context that is saved as it goes: frames to the store in a background thread, the end of the session at every turn.

The thread that evaluates copies a frame's rows out of the cache when the frame is complete (they never change afterwards) and puts
them into a short queue; the writer codes and stores them. The end of a session, its tail and its exact rows, is written when an
answer ends and when the session is closed.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import state
from .coders import is_lossy
from .conversation import Conversation, common_prefix
from .engine import Context
from .errors import DamagedError, SeqkvError, StateError, StoreError
from .gguf_meta import fingerprint
from .state import FRAME, Chunk, Exact, Layout
from .store import Identity, Node, SessionInfo, Store, Surprisal, check_name

_QUEUE = 16  # frames that may wait to be written
Say = Callable[[str], None]


@dataclass(frozen=True)
class Turn:
    """The end of an answer: where a session can be forked."""

    n_tokens: int
    n_messages: int
    n_rendered: int
    pending: list[int]


@dataclass(frozen=True)
class _Frame:
    index: int
    tokens: list[int]
    chunk: Chunk
    surprisal: Surprisal
    private: bytes
    move: bool
    """whether the session now ends here; not while it is loaded, since a kill would then lose what is behind"""


@dataclass(frozen=True)
class _End:
    n_frames: int
    tokens: list[int]
    chunk: Chunk | None
    data: dict[str, Any]


@dataclass(frozen=True)
class _Path:
    ids: list[bytes]


def identify(context: Context, salt: str = "") -> Identity:
    """What the bytes of a context's cache depend on. An empty cache takes one evaluation to ask."""
    empty = not context.n_past
    if empty:
        context.evaluate([max(0, int(context.api.llama_vocab_bos(context.model.vocab)))])
    try:
        layout = state.read_range(context.pointer, 0, 1, exact=False).layout
    finally:
        if empty:
            context.clear()
    assert context.pointer
    return identity_of(context.pointer, context.model.path, context.model.meta.n_layer, str(context.kv), layout, salt)


def identity_of(pointer: int, path: Path, n_layer: int, kv: str, layout: Layout, salt: str = "") -> Identity:
    """The identity of a llama_context whose layout is known. kv: a name for people; the layout tells types apart."""
    return Identity(fingerprint(path), path.name, kv, state.rope_digest(pointer, n_layer).hex(), layout, salt)


def read_frame(context: Context, index: int, n_sink: int) -> Chunk:
    """The chunk of a whole frame in a live cache, with the exact rows of the first n_sink positions."""
    first = FRAME * index
    piece = state.read_range(context.pointer, first, first + FRAME, exact=first < n_sink)
    sinks = piece.exact.where(piece.exact.positions < n_sink)
    return state.to_chunk(state.Piece(piece.layout, piece.positions, piece.offsets, piece.k, piece.v, sinks))


def read_end(context: Context, n_sink: int, n_window: int) -> Chunk | None:
    """The chunk of the positions behind the last whole frame, with all exact rows that the sequence holds. None: there are neither."""
    n, start = context.n_past, context.n_past // FRAME * FRAME
    first = max(0, min(start, n - n_window))
    if first == n:
        return None
    piece = state.read_range(context.pointer, first, n, exact=True)
    exact = [piece.exact]
    if first > 0 and n_sink > 0:
        exact.insert(0, state.read_range(context.pointer, 0, min(first, n_sink), exact=True).exact)
    rows = slice(start - first, None)
    both = Exact(
        np.concatenate([e.positions for e in exact]), np.concatenate([e.slots for e in exact]),
        tuple(np.concatenate([e.rows[i] for e in exact]) for i in range(len(piece.layout.k))),
    )  # fmt: skip
    k, v = (tuple(r[rows] for r in part) for part in (piece.k, piece.v))
    return state.to_chunk(state.Piece(piece.layout, piece.positions[rows], piece.offsets[rows], k, v, both))


def window_of(layout: Layout) -> tuple[int, int]:
    """(n_sink, n_window) of a seqkv cache, from its header; (0, 0) for others."""
    if not layout.header:
        return 0, 0
    at = 4
    for _ in range(2):
        at += 4 + int.from_bytes(layout.header[at : at + 4], "little")
    n_sink, n_window = (int.from_bytes(layout.header[at + i : at + i + 4], "little") for i in (0, 4))
    return n_sink, n_window


class Session:
    """A named session on a context. Raises StoreError when another process has it open."""

    def __init__(self, store: Store, name: str, context: Context, *, size_limit: int | None = None, salt: str = "", level: str | None = None) -> None:
        """size_limit: bytes that the store may take; checked when the session is closed. level: how chunks are coded (None: with the
        predictors of the context's profile, if it has any)."""
        self.store, self.name, self.context = store, check_name(name), context
        self.size_limit = size_limit
        self.say: Say = lambda _text: None
        self.identity = identify(context, salt)
        self.n_sink, self.n_window = window_of(self.identity.layout)
        self.id = store.context(self.identity)
        self.level = level or store.level(self.id, context.model.profile)
        self._lock = store.lock(name)
        try:
            # a moment of patience: others test the lock by taking it
            taken = any(self._lock.take() or time.sleep(0.05) for _ in range(10))
        except OSError as error:
            raise StoreError(f"the session store {store.path} cannot be used ({error.strerror or error}): make it writable, or use another --store") from None
        if not taken:
            raise StoreError(f"session {name!r} is in use by another process: end that, or use another --session")
        self.saving = store.find(name) is None
        """whether the stored session may be written: not before `load` has succeeded, so that what is there is never lost"""
        self.failed: SeqkvError | None = None
        """why saving has stopped"""
        self.data: Callable[[], dict[str, Any]] = dict
        """what to keep of a session beside its tokens (JSON)"""
        self._saved = 0  # frames in the queue or written
        self._seen = 0  # tokens in the cache at the last look
        self._ending = False  # whether the stored session may be cut back to what the cache holds
        self._private = b""
        self._bits: dict[int, tuple[float, int]] = {}  # by frame
        self._queue: queue.Queue[_Frame | _End | _Path | None] = queue.Queue(_QUEUE)
        self._path: list[bytes] = []  # the writer's
        self._writer = threading.Thread(target=self._write, name="seqkv session writer", daemon=True)
        context.before, context.after = self._before, self._after
        context.changed_from = 0
        self._writer.start()

    # --- saving, on the thread that evaluates ---

    def _before(self, tokens: Sequence[int]) -> None:
        """Add the surprisal of the next token, if its logits were computed anyway."""
        context = self.context
        if context.has_logits:
            logits = context.next_logits()
            top = float(logits.max())
            nats = top + float(np.log(np.exp(logits - top).sum(dtype=np.float64))) - float(logits[tokens[0]])
            bits, n = self._bits.get(context.n_past // FRAME, (0.0, 0))
            self._bits[context.n_past // FRAME] = bits + nats / np.log(2), n + 1

    def _sync(self) -> None:
        context = self.context
        if context.changed_from < FRAME * self._saved:
            self._saved = context.changed_from // FRAME
        if context.changed_from < self._seen:
            for frame in [f for f in self._bits if f >= context.changed_from // FRAME]:
                del self._bits[frame]
        if context.moved_from is None:
            self._private = b""
        elif not self._private:
            self._private = os.urandom(16)
        context.changed_from = self._seen = context.n_past

    def _after(self) -> None:
        if self.failed or not self.saving:
            return
        self._sync()
        context = self.context
        while FRAME * (self._saved + 1) <= context.n_past:
            i = self._saved
            moved = context.moved_from is not None and FRAME * (i + 1) > context.moved_from
            bits, n = self._bits.pop(i, (0.0, 0))
            tokens = context.tokens[FRAME * i : FRAME * (i + 1)]
            try:
                chunk = read_frame(context, i, self.n_sink)
            except StateError as error:
                self._fail(error)
                return
            self._queue.put(_Frame(i, tokens, chunk, Surprisal(bits, n), self._private if moved else b"", self._ending))
            self._saved += 1

    def save(self, *, end: bool) -> None:
        """Save the session's row. end: with the state of its end, so that it continues bit for bit.

        Raises StoreError when the store has a session of this name that was not loaded.
        """
        if not self.saving:
            raise StoreError(f"there is a session {self.name!r} that was not loaded: load it, or choose another name")
        if self.failed:
            return
        self._after()
        context = self.context
        data = {"moved_from": context.moved_from} | self.data()
        try:
            chunk = read_end(context, self.n_sink, self.n_window) if end and context.n_past else None
        except StateError as error:
            self._fail(error)
            return
        n = context.n_past // FRAME
        self._ending = True
        self._queue.put(_End(n, context.tokens[FRAME * n :], chunk, data))

    def _fail(self, error: SeqkvError) -> None:
        if self.failed is None:
            self.failed = error
            self.say(f"the session is no longer saved: {error}")

    # --- the writer's thread ---

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if not self.failed:
                    self._write_one(item)
            except SeqkvError as error:
                self._fail(error)
            except Exception as error:  # the chat goes on, and says it
                self._fail(StoreError(f"saving failed ({type(error).__name__}: {' '.join(str(error).split())}): what was saved before is kept"))
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _write_one(self, item: _Frame | _End | _Path) -> None:
        if isinstance(item, _Path):
            self._path = list(item.ids)
        elif isinstance(item, _Frame):
            del self._path[item.index :]
            id_ = self.store.put(
                self.id, self._path[-1] if self._path else None, item.tokens, item.chunk, surprisal=item.surprisal,
                private=item.private, level=self.level, session=self.name if item.move else None,
            )  # fmt: skip
            self._path.append(id_)
        else:
            del self._path[item.n_frames :]
            self.store.save(self.name, self.id, self._path[-1] if self._path else None, item.tokens, item.chunk, item.data)

    def flush(self) -> None:
        """Wait until everything queued is on disk."""
        self._queue.join()

    def close(self) -> None:
        """Save the end, stop the writer, apply the size limit, free the name."""
        try:
            if self._writer.is_alive():
                if self.context.pointer and self.saving:
                    self.save(end=True)
                self._queue.put(None)
                self._writer.join()
                self.context.before = self.context.after = None
                if self.size_limit is not None and not self.failed:
                    self.store.gc(self.size_limit)
        finally:
            self._lock.free()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- restoring ---

    def load(self) -> SessionInfo | None:
        """Put the session's state into the context: bit for bit as it was, or, where chunks are missing or made for something
        else, by evaluating its tokens again (said through `say`). None: a new session, nothing is done.

        Raises StoreError: it does not fit the context, or its coded tokens cannot be decoded here.
        """
        info = self.store.find(self.name)
        if info is not None:
            self._load(info)
        self.saving = True
        return info

    def _load(self, info: SessionInfo) -> None:
        theirs = self.store.context_of(info.context)
        if theirs.model_id != self.identity.model_id:
            self.say(f"session {self.name!r} was made with {theirs.model_name}: its text is evaluated again with this model")
            return
        if info.n_tokens > self.context.n_ctx:
            raise StoreError(f"session {self.name!r} holds {info.n_tokens} tokens, the context {self.context.n_ctx}: use --ctx {info.n_tokens} or more")
        tokens = self.store.tokens(info, self._decode_model)
        if info.context != self.id:
            what = "KV type" if theirs.kv != self.identity.kv else "profile, window or RoPE"
            self.say(f"session {self.name!r} was made with another {what} ({theirs.kv}): its {len(tokens)} tokens are evaluated again")
            self._evaluate(tokens)
            return
        path = self.store.path_to(info.node)
        tail = None
        try:
            tail = self.store.read_tail(info) if info.coder is None else None
        except DamagedError as error:
            self.say(str(error))
        moved = info.data.get("moved_from")
        self._restore(tokens, path, tail, moved if isinstance(moved, int) and moved >= 0 else None)

    def _decode_model(self, coded: bytes) -> list[int]:
        from .model_coder import decode

        return decode(self.context.model, coded)

    def _evaluate(self, tokens: Sequence[int]) -> None:
        self.context.evaluate(tokens)

    def _restore(self, tokens: list[int], path: Sequence[Node], tail: Chunk | None, moved_from: int | None) -> None:
        """Frames of `path` from their chunks; then the tail from its own, or by evaluation."""
        whole = next((i for i, node in enumerate(path) if node.level is None), len(path))
        if whole < len(path):
            self.say(f"tokens from {FRAME * whole} on have no chunks in the store: they are evaluated again")
            tail = None
        # without the exact rows of the end, its last frame is evaluated again, by itself, so that all who do this get the same bytes
        again = int(self.n_window > 0 and moved_from is None)
        wanted = path[:whole] if tail is not None else path[: max(0, whole - again)]
        chunks, damaged = self.store.restore(wanted)
        if damaged:
            self.say(str(damaged))
            tail, chunks = None, chunks[: max(0, len(chunks) - again)]
        if lossy := [node for node in path[: len(chunks)] if is_lossy(node.level)]:
            self.say(f"{FRAME * len(lossy)} of its tokens were stored with loss: it goes on close to what it was, not bit for bit")
        exact = None
        n = FRAME * len(chunks)
        pieces = [(chunk, FRAME) for chunk in chunks]
        if tail is not None:
            n_tail = len(tokens) - n
            exact = state.check_chunk(tail, self.identity.layout, n_tail)
            pieces.append((tail, n_tail))
            n += n_tail
        if n:
            moved_from = moved_from if moved_from is not None and moved_from < n else None
            try:
                self.context.set_state(state.build(self.identity.layout, pieces, tokens[:n], exact), tokens[:n], moved_from)
            except StateError as error:
                self.say(f"{error}: its {len(tokens)} tokens are evaluated again")
                n, chunks, tail = 0, [], None
        if not n:
            self.context.clear()
        ids = [node.id for node in path[: len(chunks)]]
        self._queue.put(_Path(ids))
        self._saved = len(ids)
        self._seen = self.context.changed_from = self.context.n_past
        if n < len(tokens):
            if tail is None and n % FRAME == 0 and len(tokens) - n > FRAME:
                self._evaluate(tokens[n : n + FRAME])
                n += FRAME
            self._evaluate(tokens[n:])

    def find_prefix(self, tokens: list[int], reused: int) -> int:
        """The longest stored prefix of `tokens` into the cache, if that saves more than a frame. Returns what the cache then holds."""
        try:
            path = self.store.longest_prefix(self.id, tokens[:-1])
            if FRAME * (len(path) - 1) <= reused + FRAME:
                return reused
            self._restore(tokens[: FRAME * len(path)], path, None, None)
        except (StateError, StoreError) as error:
            self.say(f"stored frames could not be used: {error}")
        return min(common_prefix(tokens, self.context.tokens), len(tokens) - 1)


class ChatSession:
    """A session and the conversation on it."""

    def __init__(self, session: Session, conversation: Conversation) -> None:
        self.session, self.conversation = session, conversation
        self.turns: list[Turn] = []
        session.data = self._data
        self._moved: int | None = None

    def open(self) -> str:
        """Load what is stored of the session, and save from now on. Returns a line to show."""
        session, talk = self.session, self.conversation
        info = session.load()
        line = f"new session {session.name!r}"
        if info is not None:
            session.saving = False  # until the conversation is whole too
            same = session.store.context_of(info.context).model_id == session.identity.model_id
            if not talk.from_json(info.data, cached=same):
                session.say("the last question had no answer yet: ask it again")
            turns = info.data.get("turns")
            self.turns = _turns(turns) if same and isinstance(turns, list) else []
            session.saving = True
            line = f"session {session.name!r}: {session.context.n_past} tokens, {len(talk.messages)} messages"
        if session.level == "raw" and session.context.kv.ours:
            session.say("its frames are stored as they are: the profile has no predictors to code them with ('calibrate --predictors' adds them)")
        self._moved = session.context.moved_from
        talk.changed = self._changed
        talk.find_prefix = session.find_prefix
        self.session.save(end=info is not None)
        return line

    def _changed(self) -> None:
        talk, context = self.conversation, self.session.context
        if context.moved_from != self._moved or not talk.messages:
            self.turns, self._moved = [], context.moved_from  # positions of earlier turns are no longer theirs
        ended = talk.answer_from is None and bool(talk.messages) and talk.messages[-1]["role"] == "assistant"
        if ended:
            self.turns = [t for t in self.turns if t.n_messages < len(talk.messages)]
            self.turns.append(Turn(context.n_past, len(talk.messages), len(talk.rendered), list(talk.pending)))
        self.session.save(end=ended)

    def _data(self) -> dict[str, Any]:
        turns = [[t.n_tokens, t.n_messages, t.n_rendered, t.pending] for t in self.turns]
        return self.conversation.as_json() | {"turns": turns}


def _turns(data: list[Any]) -> list[Turn]:
    """Raises StateError."""
    try:
        turns = [Turn(int(a), int(b), int(c), [int(t) for t in d]) for a, b, c, d in data]
    except (TypeError, ValueError):
        raise StateError("the turns of a saved conversation are damaged") from None
    return turns


def fork(store: Store, source: str, name: str, turn: int | None = None) -> SessionInfo:
    """A new session that begins like `source` up to the end of a turn (1, 2, ...; negative: from the end; None: all of it)."""
    info = store.session(source)
    if turn is None:
        store.fork(source, name)
        return store.session(name)
    turns = _turns(info.data.get("turns") or [])
    if not turns or not (1 <= turn <= len(turns) or -len(turns) <= turn <= -1):
        raise StoreError(f"session {source!r} can be forked at turns 1 to {len(turns)}, not {turn}" if turns else f"session {source!r} has no turns to fork at")
    at = turns[turn - 1 if turn > 0 else turn]
    kept = turns[: turns.index(at) + 1]
    data = info.data | {
        "messages": info.data["messages"][: at.n_messages],
        # an empty text means: reuse by tokens
        "rendered": info.data["rendered"][: at.n_rendered] if len(info.data["rendered"]) >= at.n_rendered else "",
        "pending": at.pending,
        "answer_from": None,
        "turns": [[t.n_tokens, t.n_messages, t.n_rendered, t.pending] for t in kept],
    }
    store.fork(source, name, at.n_tokens, data)
    return store.session(name)
