"""The session store: a trie of frames shared by all sessions, on disk.

A store is a directory: `index.sqlite` (WAL) holds what is small, `chunks/` one file per chunk. Chunks are files and not blobs
because a damaged page then costs one chunk and never the index, deleting gives the space back at once, and nothing is written twice
(WAL). The price, atomicity, is paid by order: a file is complete under its name before a row mentions it, and files without a row
are swept under the write lock. Nothing is synced chunk by chunk: after a power cut a checksum tells which chunks did not arrive.

A node is one frame of 64 tokens, addressed by blake3(parent id, context key, token ids); the context key hashes all that keys and
values depend on besides tokens (`Identity`). So a prefix that two sessions share is stored once, whoever wrote it first. Two
evaluations of the same tokens may differ in a rounding (batching, threads, backends): a frame with other bytes becomes a variant
beside the first, with an id of its own, because a session must get back what it had. Frames that depend on more than their
path (after a context shift, or imported) are private: never found by their tokens.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import coders, delta
from .errors import DamagedError, SeqkvError, StateError, StoreError
from .state import FRAME, Chunk, Layout, check_chunk

VERSION = 1
"""of the database (user_version) and of what its rows mean"""
ROOT = b"\0" * 32
_NAME = re.compile(r"[^\x00-\x1f/\\]{1,100}")
_MAX_EVENTS = 1000
_SCHEMA = f"""
CREATE TABLE contexts (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, data TEXT NOT NULL);
CREATE TABLE nodes (
    id BLOB PRIMARY KEY, address BLOB NOT NULL, parent BLOB, context INTEGER NOT NULL, depth INTEGER NOT NULL, tokens BLOB NOT NULL,
    private INTEGER NOT NULL, bits REAL NOT NULL, n_bits INTEGER NOT NULL,
    content BLOB NOT NULL, level TEXT, size INTEGER NOT NULL, digest BLOB NOT NULL,
    created REAL NOT NULL, used REAL NOT NULL, hits INTEGER NOT NULL);
CREATE INDEX nodes_address ON nodes(address);
CREATE INDEX nodes_parent ON nodes(parent);
CREATE TABLE sessions (
    name TEXT PRIMARY KEY, context INTEGER NOT NULL, node BLOB, tokens BLOB NOT NULL,
    tail TEXT, tail_size INTEGER NOT NULL, tail_digest BLOB, tail_content BLOB,
    coder TEXT, coded BLOB, n_tokens INTEGER NOT NULL, data TEXT NOT NULL, created REAL NOT NULL, used REAL NOT NULL);
CREATE TABLE events (time REAL NOT NULL, what TEXT NOT NULL, why TEXT NOT NULL);
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True)
class Identity:
    """All that a cache's bytes depend on besides tokens."""

    model_id: str
    """fingerprint of the model file"""
    model_name: str
    kv: str
    rope: str
    """hash of the rotations in use, hex"""
    layout: Layout
    salt: str = ""
    """what else a caller changed (an adapter, say)"""

    def as_json(self) -> str:
        fields = {"model_id": self.model_id, "model_name": self.model_name, "kv": self.kv, "rope": self.rope, "salt": self.salt}
        return json.dumps(fields | {"layout": self.layout.as_json()}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Identity:
        """Raises StoreError."""
        try:
            data = json.loads(text)
            fields = {name: data[name] for name in ("model_id", "model_name", "kv", "rope", "salt")}
            if not all(isinstance(value, str) and len(value) < 1000 for value in fields.values()):
                raise StoreError("the description of a session's context is damaged")
            return Identity(**fields, layout=Layout.from_json(data["layout"]))
        except (ValueError, TypeError, KeyError, StateError):
            raise StoreError("the description of a session's context is damaged") from None

    @property
    def key(self) -> bytes:
        """Hash of all but the names for people: a model's file may be renamed, and the layout tells KV types apart."""
        fields = {"model_id": self.model_id, "rope": self.rope, "salt": self.salt, "layout": self.layout.as_json()}
        return blake3_of(json.dumps(fields, sort_keys=True).encode())


class Coder(Protocol):
    """A lossless coder of the blocks of a chunk by itself. Both sides know the tokens and what the cache is of (model, profile, types).
    Coders that look at the frames before (coders.py) are made for a path."""

    def encode(self, blocks: bytes, identity: Identity, tokens: Sequence[int]) -> bytes: ...

    def decode(self, coded: bytes, identity: Identity, tokens: Sequence[int]) -> bytes:
        """Raises SeqkvError for bytes that it did not write."""
        ...


class Raw:
    """Level "raw": blocks as they are."""

    def encode(self, blocks: bytes, identity: Identity, tokens: Sequence[int]) -> bytes:
        return blocks

    def decode(self, coded: bytes, identity: Identity, tokens: Sequence[int]) -> bytes:
        return coded


CODERS: dict[str, Coder] = {"raw": Raw(), "lossy": Raw()}
"""by level, those of chunks by themselves; a row names the level that its file was written with"""


@dataclass(frozen=True)
class Surprisal:
    """-log2 P(token | before), summed over the tokens of a frame whose logits were at hand."""

    bits: float = 0.0
    n: int = 0


@dataclass(frozen=True)
class Node:
    """A frame of the trie."""

    id: bytes
    parent: bytes | None
    context: int
    depth: int
    """frames before it"""
    tokens: tuple[int, ...]
    private: bool
    surprisal: Surprisal
    level: str | None
    """None: its chunk is gone, its tokens are not"""
    size: int
    """bytes of the chunk's file"""
    used: float
    hits: int


@dataclass(frozen=True)
class SessionInfo:
    """A row of `sessions`."""

    name: str
    context: int
    node: bytes | None
    """last whole frame"""
    tail_tokens: tuple[int, ...]
    """tokens behind it; with a coder: none"""
    tail_size: int
    """bytes of the chunk of the tail and of the exact rows, 0: there is none"""
    coder: str | None
    """all tokens are coded: of tokens.CODERS, or "model" """
    coded_size: int
    n_tokens: int
    data: dict[str, Any]
    created: float
    used: float


@dataclass(frozen=True)
class Removed:
    """What `gc` did."""

    nodes: int = 0
    """rows without a session"""
    chunks: int = 0
    """chunks dropped, their tokens kept"""
    tails: int = 0
    coded: int = 0
    """sessions whose tokens were coded"""
    sessions: int = 0
    """sessions deleted"""
    files: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Problem:
    """A finding of `verify`."""

    where: str
    what: str


def blake3_of(data: bytes) -> bytes:
    from blake3 import blake3

    return blake3(data).digest()


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """u32 little-endian, 4 bytes a token."""
    return np.asarray(list(tokens), "<i8").astype("<u4").tobytes()


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(data, "<u4").tolist())


def address_of(parent: bytes | None, key: bytes, tokens: Sequence[int]) -> bytes:
    """The address of a frame under a parent node (None: the root) in the context `key`."""
    return blake3_of((parent or ROOT) + key + pack_tokens(tokens))


def _pack(extra: bytes, coded: bytes) -> bytes:
    """A chunk's file: length of extra (u32), extra, coded blocks."""
    return struct.pack("<I", len(extra)) + extra + coded


def _unpack(data: bytes) -> tuple[bytes, bytes]:
    """Extra and coded blocks of a chunk's file. Raises StateError."""
    if len(data) < 4 or struct.unpack("<I", data[:4])[0] > len(data) - 4:
        raise StateError("a chunk is cut short")
    end = 4 + struct.unpack("<I", data[:4])[0]
    return data[4:end], data[end:]


def pack_chunk(chunk: Chunk, level: str, identity: Identity, tokens: Sequence[int]) -> bytes:
    """The file of a chunk by itself."""
    return _pack(chunk.extra, CODERS[level].encode(chunk.blocks, identity, tokens))


def unpack_chunk(data: bytes, level: str, identity: Identity, tokens: Sequence[int]) -> Chunk:
    """Raises StateError, or what the coder raises, for anything but a chunk of these tokens."""
    if level not in CODERS:
        raise StateError(f"a chunk was written at the level {level!r}, which this version does not know: upgrade seqkv-edge")
    extra, coded = _unpack(data)
    chunk = Chunk(CODERS[level].decode(coded, identity, tokens), extra)
    check_chunk(chunk, identity.layout, len(tokens))
    return chunk


def _content(chunk: Chunk) -> bytes:
    return blake3_of(struct.pack("<I", len(chunk.extra)) + chunk.extra + chunk.blocks)


def default_path() -> Path:
    """Where sessions are kept if nothing else is said."""
    import platformdirs

    return Path(platformdirs.user_data_dir("seqkv-edge", appauthor=False)) / "store"


def check_name(name: str) -> str:
    """Raises StoreError for what is no name of a session."""
    if not _NAME.fullmatch(name) or name.strip() != name:
        raise StoreError(f"{name!r} is no session name: use 1 to 100 characters without / and \\")
    return name


class Lock:
    """A name that one process holds; freed by the system when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def take(self) -> bool:
        """False: another process (or another Lock) has it."""
        self.path.parent.mkdir(exist_ok=True)
        file = open(self.path, "a+b")
        try:
            if os.name == "nt":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        self._file = file
        return True

    def free(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Store:
    """See the module. Safe to use from several threads and processes. Every method raises StoreError."""

    def __init__(self, path: Path | str, *, create: bool = True) -> None:
        self.path = Path(path)
        self.chunks = self.path / "chunks"
        self._lock = threading.RLock()
        self._keys: dict[int, Identity] = {}
        self._delta: dict[tuple[int, str], delta.Coder | None] = {}  # by context and level
        self._ends: dict[tuple[int, str], tuple[bytes | None, coders.Delta]] = {}  # a coder of a path, and where that ends
        self._db: sqlite3.Connection | None = None
        if not create and not (self.path / "index.sqlite").is_file():
            raise StoreError(f"there is no session store in {self.path}: 'chat --session NAME' makes one")
        with self._explained():
            self.chunks.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path / "index.sqlite", timeout=30, isolation_level=None, check_same_thread=False)
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._open()
            except BaseException:
                self.close()
                raise

    def _open(self) -> None:
        with self._change() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise StoreError(
                    f"the store in {self.path} was written by a newer seqkv-edge (version {version}, this one knows {VERSION}): "
                    "upgrade seqkv-edge, or use another --store"
                )
            if version == 0:
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise StoreError(f"{self.path / 'index.sqlite'} is a database of something else: use another --store")
                for statement in filter(None, (s.strip() for s in _SCHEMA.split(";"))):
                    db.execute(statement)

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of SQLite and of files as one line that says what to do."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            text = str(error)
            if "malformed" in text or "not a database" in text:
                advice = f"the index is damaged: move {self.path} away, its sessions are lost, or restore it from a backup"
            elif "full" in text or "disk I/O" in text:
                advice = "free some space on the disk, or use another --store; what was saved before is kept"
            elif "readonly" in text or "unable to open" in text:
                advice = "make the directory writable, or use another --store"
            elif "locked" in text:
                advice = "another process keeps it busy: try again when it has ended"
            else:
                advice = "'session verify' looks for damage"
            raise StoreError(f"the session store {self.path} failed ({text}): {advice}") from None
        except OSError as error:
            advice = "free some space or make the directory writable, or use another --store; what was saved before is kept"
            raise StoreError(f"the session store {self.path} cannot be used ({error.strerror or error}): {advice}") from None

    @property
    def db(self) -> sqlite3.Connection:
        if self._db is None:
            raise StoreError(f"the session store {self.path} is closed")
        return self._db

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained():
            yield self.db

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction, with the write lock of all processes from its start."""
        with self._lock, self._explained():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self.db.execute("ROLLBACK")
                raise

    # --- contexts ---

    def context(self, context: Identity) -> int:
        """The id of a context, added if it is new."""
        key = context.key
        with self._read() as db:
            row = db.execute("SELECT id FROM contexts WHERE key = ?", (key,)).fetchone()
        if row is None:
            with self._change() as db:
                db.execute("INSERT OR IGNORE INTO contexts (key, data) VALUES (?, ?)", (key, context.as_json()))
                row = db.execute("SELECT id FROM contexts WHERE key = ?", (key,)).fetchone()
        self._keys[row[0]] = context
        return int(row[0])

    def context_of(self, id_: int) -> Identity:
        if id_ not in self._keys:
            with self._read() as db:
                row = db.execute("SELECT data FROM contexts WHERE id = ?", (id_,)).fetchone()
            if row is None:
                raise StoreError(f"the session store {self.path} has no context {id_}: 'session verify' looks for damage")
            self._keys[id_] = Identity.from_json(row[0])
        return self._keys[id_]

    # --- files ---

    def _file(self, name: str) -> Path:
        return self.chunks / name[:2] / name

    def _write(self, name: str, data: bytes) -> None:
        """Complete under its name, or not there."""
        path = self._file(name)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f"{name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def _read_file(self, name: str, size: int, digest: bytes, where: str) -> bytes:
        """Raises DamagedError unless the file is what was written."""
        try:
            with self._file(name).open("rb") as file:
                data = file.read(size + 1)
        except FileNotFoundError:
            raise DamagedError(f"{where} is missing in {self.path}: its tokens are evaluated again") from None
        if len(data) != size or blake3_of(data) != digest:
            raise DamagedError(f"{where} is damaged in {self.path}: its tokens are evaluated again")
        return data

    def _known_files(self, db: sqlite3.Connection) -> set[str]:
        found = {chunk_name(id_, level) for id_, level in db.execute("SELECT id, level FROM nodes WHERE level IS NOT NULL")}
        return found | {row[0] for row in db.execute("SELECT tail FROM sessions WHERE tail IS NOT NULL")}

    @staticmethod
    def _is_known(db: sqlite3.Connection, name: str) -> bool:
        stem, _, level = name.rpartition(".")
        if level == "tail":
            return db.execute("SELECT 1 FROM sessions WHERE tail = ? LIMIT 1", (name,)).fetchone() is not None
        return db.execute("SELECT 1 FROM nodes WHERE id = ? AND level = ?", (bytes.fromhex(stem), level)).fetchone() is not None

    def _sweep(self, names: Iterable[str] | None = None) -> tuple[int, int]:
        """Unlink files (None: all) that no row mentions. Returns their number and bytes."""
        n = size = 0
        with self._change() as db:
            if names is None:
                # a write in progress holds the lock, so that temporary files are left-overs
                known = self._known_files(db)
                paths = [p for p in self.chunks.glob("*/*") if p.is_file() and p.name not in known]
            else:
                paths = [self._file(name) for name in set(names) if not self._is_known(db, name)]
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    size += path.stat().st_size
                    path.unlink()
                    n += 1
        return n, size

    # --- frames ---

    def put(
        self, context: int, parent: bytes | None, tokens: Sequence[int], chunk: Chunk, *, surprisal: Surprisal = Surprisal(),
        private: bytes = b"", level: str = "raw", session: str | None = None,
    ) -> bytes:  # fmt: skip
        """Store one frame under `parent` (None: the root) unless it is there already. Returns its node's id.

        private: not empty if the chunk depends on more than the tokens of its path; the same bytes for the same history.
        session: moves the head of this session to the frame, in the same transaction.
        """
        known = self.context_of(context)
        if len(tokens) != FRAME:
            raise StoreError(f"a frame has {FRAME} tokens, not {len(tokens)}")
        coder = None
        if level in CODERS:
            data = pack_chunk(chunk, level, known, tokens)
        else:
            data, level, coder = self._code_next(context, parent, tokens, chunk, level)
            chunk = chunk if coder is None else Chunk(coder.stored(chunk.blocks), chunk.extra)
        content, address, now = _content(chunk), address_of(parent, known.key, tokens), time.time()
        with self._change() as db:
            depth = 0
            if parent is not None:
                row = db.execute("SELECT depth, private FROM nodes WHERE id = ?", (parent,)).fetchone()
                if row is None:
                    raise StoreError("a frame's parent is no longer in the store: another process has removed it")
                depth = row[0] + 1
                private = private or (parent if row[1] else b"")
            id_ = self._place(db, address, content, private)
            row = db.execute("SELECT level FROM nodes WHERE id = ?", (id_,)).fetchone()
            if row is None or row[0] is None:
                self._write(chunk_name(id_, level), data)
            if row is None:
                db.execute(
                    "INSERT INTO nodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
                    (id_, address, parent, context, depth, pack_tokens(tokens), bool(private), surprisal.bits, surprisal.n,
                     content, level, len(data), blake3_of(data), now, now),
                )  # fmt: skip
            else:
                if row[0] is None:
                    db.execute(
                        "UPDATE nodes SET content = ?, level = ?, size = ?, digest = ? WHERE id = ?",
                        (content, level, len(data), blake3_of(data), id_),
                    )
                db.execute("UPDATE nodes SET used = ?, hits = hits + 1 WHERE id = ?", (now, id_))
                db.execute("UPDATE nodes SET bits = ?, n_bits = ? WHERE id = ? AND n_bits < ?", (surprisal.bits, surprisal.n, id_, surprisal.n))
            if session is not None:
                self._move(db, session, id_, depth + 1)
        if coder is not None:
            self._ends[context, level] = (id_, coder)
        return id_

    # --- levels that look at the frames before ---

    def level(self, context: int, profile: Path | None, kind: str = "small") -> str:
        """The name of a level for the frames of a context, which is coded with the predictors of a profile; "raw" where that
        cannot be: no profile, or one without predictors, or rows that have none. A copy of the profile is kept in the store."""
        if profile is None:
            return "raw"
        with self._explained():
            data = profile.read_bytes()
        name = coders.level_name(kind, blake3_of(data))
        kept = self._profile(name)
        with self._explained():
            if not kept.is_file() or kept.read_bytes() != data:
                self._delta.clear()
                if coders.predictors(profile, self.context_of(context).layout) is None:
                    return "raw"
                kept.parent.mkdir(exist_ok=True)
                temporary = kept.with_name(f"{kept.name}.{os.getpid()}-{threading.get_ident()}.tmp")
                temporary.write_bytes(data)
                os.replace(temporary, kept)
        return name if self._predictors(context, name) is not None else "raw"

    def _profile(self, level: str) -> Path:
        kind = coders.split_level(level)
        assert kind is not None
        return self.path / "profiles" / f"{kind[1]}.seqkv.gguf"

    def _predictors(self, context: int, level: str) -> delta.Coder | None:
        """None: this version, or this store, cannot code at the level."""
        if (context, level) not in self._delta:
            found = None
            if coders.split_level(level) is not None and self._profile(level).is_file():
                try:
                    found = coders.predictors(self._profile(level), self.context_of(context).layout)
                except SeqkvError:
                    found = None  # a damaged copy: its chunks are evaluated again
            self._delta[context, level] = found
        return self._delta[context, level]

    def _path_coder(self, context: int, level: str) -> coders.Delta:
        """At the root. Raises StateError."""
        found, split = self._predictors(context, level), coders.split_level(level)
        if split is None:
            raise StateError(f"a chunk was written at the level {level!r}, which this version does not know: upgrade seqkv-edge")
        if found is None:
            raise StateError(f"the predictors of the level {level!r} are missing or damaged in {self.path / 'profiles'}")
        return coders.path_coder(found, split[0])

    def _code_next(
        self, context: int, parent: bytes | None, tokens: Sequence[int], chunk: Chunk, level: str
    ) -> tuple[bytes, str, coders.Delta | None]:
        """The file of the frame behind `parent`, the level it was coded at ("raw" where a frame before it is damaged), and the coder,
        which is now behind it."""
        at, coder = self._ends.pop((context, level), (None, None))
        if coder is None or at != parent:
            path = self.path_to(parent)
            chunks, error, ends = self._walk(path, level)
            if error is not None or len(chunks) < len(path):
                return pack_chunk(chunk, "raw", self.context_of(context), tokens), "raw", None
            coder = ends.get(level) or self._path_coder(context, level)
        return _pack(chunk.extra, coder.encode(tokens, chunk)), level, coder

    def _walk(self, nodes: Sequence[Node], *levels: str) -> tuple[list[Chunk], DamagedError | None, dict[str, coders.Delta]]:
        """The chunks of a path from the root, up to the first one that cannot be had, and why; coders at its end, of the path's
        levels and of `levels`."""
        chunks: list[Chunk] = []
        ends: dict[str, coders.Delta] = {}
        context = nodes[0].context if nodes else 0
        wanted = {n.level for n in nodes if n.level is not None and n.level not in CODERS} | set(levels if nodes else ())
        try:
            for level in sorted(wanted - CODERS.keys()):
                with contextlib.suppress(StateError):
                    ends[level] = self._path_coder(context, level)
            while len(chunks) < len(nodes):
                first = len(chunks)
                level, error = nodes[first].level, None
                if level not in ends:
                    found = [self._read_alone(nodes[first])]
                else:
                    end = next((i for i in range(first, len(nodes)) if nodes[i].level != level), len(nodes))
                    found, error = self._decode_run(nodes[first : min(end, first + 4 * coders.WINDOW)], ends[level])
                for node, chunk in zip(nodes[first:], found):
                    for other, coder in ends.items():
                        if other != level:
                            coder.add(node.tokens, chunk)
                chunks += found
                if error is not None:
                    return chunks, error, {}
        except DamagedError as error:
            return chunks, error, {}
        return chunks, None, ends

    def _decode_run(self, nodes: Sequence[Node], coder: coders.Delta) -> tuple[list[Chunk], DamagedError | None]:
        """The chunks of consecutive nodes of one level, up to the first damaged one, and what is wrong with that. Raises DamagedError."""
        frames: list[tuple[Sequence[int], bytes, bytes]] = []
        damaged = None
        for node in nodes:
            try:
                frames.append((node.tokens, *self._read_packed(node)))
            except DamagedError as error:
                damaged = error
                break
        if not frames:
            return [], damaged
        layout = self.context_of(nodes[0].context).layout
        try:
            chunks = [Chunk(blocks, extra) for blocks, (_, extra, _) in zip(coder.decode_run(frames), frames)]
            for chunk in chunks:
                check_chunk(chunk, layout, FRAME)
            for node, chunk in zip(nodes, chunks):
                with self._read() as db:
                    row = db.execute("SELECT content FROM nodes WHERE id = ?", (node.id,)).fetchone()
                if row is None or row[0] != _content(chunk):
                    raise StateError("a chunk decodes to something else than was stored")
        except SeqkvError as error:
            self._forget_chunk(nodes[0], str(error))
            raise DamagedError(f"{_where(nodes[0])} is damaged in {self.path}: its tokens are evaluated again") from None
        return chunks, damaged

    def find_same(self, context: int, parent: bytes | None, tokens: Sequence[int], chunk: Chunk) -> bytes | None:
        """The node under `parent` with these tokens and this very chunk, if others may find it."""
        address = address_of(parent, self.context_of(context).key, tokens)
        with self._read() as db:
            row = db.execute(
                "SELECT id FROM nodes WHERE address = ? AND content = ? AND NOT private AND level IS NOT NULL", (address, _content(chunk))
            ).fetchone()
        return None if row is None else bytes(row[0])

    def _place(self, db: sqlite3.Connection, address: bytes, content: bytes, private: bytes) -> bytes:
        """The id under which a chunk belongs: that of the same bytes, or of a node that lost its own, or a new one."""
        own = blake3_of(address + content + private)
        if private:
            return own
        for id_, level, stored in db.execute("SELECT id, level, content FROM nodes WHERE address = ? AND NOT private", (address,)).fetchall():
            below = db.execute("SELECT 1 FROM nodes WHERE parent = ? AND level IS NOT NULL LIMIT 1", (id_,)).fetchone()
            if stored == content or (level is None and below is None):
                return bytes(id_)
        taken = db.execute("SELECT 1 FROM nodes WHERE id = ?", (address,)).fetchone()
        return own if taken else address

    def _move(self, db: sqlite3.Connection, session: str, node: bytes | None, n_frames: int) -> None:
        found = db.execute(
            "UPDATE sessions SET node = ?, tokens = x'', tail = NULL, tail_size = 0, coder = NULL, coded = NULL, n_tokens = ?, used = ? "
            "WHERE name = ?", (node, FRAME * n_frames, time.time(), session),
        )  # fmt: skip
        if not found.rowcount:
            raise StoreError(f"the session {session!r} is no longer in the store: another process has removed it")

    _COLUMNS = "id, parent, context, depth, tokens, private, bits, n_bits, level, size, used, hits"

    @staticmethod
    def _node(row: Sequence[Any]) -> Node:
        id_, parent, context, depth, tokens, private, bits, n_bits, level, size, used, hits = row
        surprisal = Surprisal(bits, n_bits)
        return Node(id_, parent, context, depth, unpack_tokens(tokens), bool(private), surprisal, level, size, used, hits)

    def node(self, id_: bytes) -> Node:
        with self._read() as db:
            row = db.execute(f"SELECT {self._COLUMNS} FROM nodes WHERE id = ?", (id_,)).fetchone()
        if row is None:
            raise StoreError(f"the session store {self.path} has no node {id_.hex()[:16]}")
        return self._node(row)

    def nodes(self) -> list[Node]:
        """All nodes, parents before children."""
        with self._read() as db:
            return [self._node(row) for row in db.execute(f"SELECT {self._COLUMNS} FROM nodes ORDER BY depth, created, id")]

    def path_to(self, id_: bytes | None) -> list[Node]:
        """The nodes from the root to one, in order."""
        found: list[Node] = []
        while id_ is not None:
            found.append(self.node(id_))
            id_ = found[-1].parent
        return found[::-1]

    def longest_prefix(self, context: int, tokens: Sequence[int]) -> list[Node]:
        """The longest path of frames with chunks whose tokens begin `tokens`; private frames are not found."""
        key = self.context_of(context).key
        best: list[Node] = []
        stack: list[tuple[bytes | None, list[Node]]] = [(None, [])]
        with self._read() as db:
            while stack:
                parent, path = stack.pop()
                if len(path) > len(best):
                    best = path
                start = FRAME * len(path)
                frame = tokens[start : start + FRAME]
                if len(frame) < FRAME:
                    continue
                rows = db.execute(
                    f"SELECT {self._COLUMNS} FROM nodes WHERE address = ? AND NOT private AND level IS NOT NULL ORDER BY used",
                    (address_of(parent, key, frame),),
                ).fetchall()
                for node in map(self._node, rows):
                    if node.tokens == tuple(frame):
                        stack.append((node.id, [*path, node]))
        return best

    def read_chunk(self, node: Node) -> Chunk:
        """The chunk of a node, checked. Raises DamagedError; the chunk that is damaged, of the node or of one before it that it is
        coded from, is then marked as gone."""
        if node.level is None or node.level in CODERS:
            return self._read_alone(node)
        path = self.path_to(node.id)
        chunks, error, _ = self._walk(path)
        if error is not None:
            raise error
        return chunks[-1]

    def _read_packed(self, node: Node) -> tuple[bytes, bytes]:
        """Extra and coded blocks of a node's chunk. Raises DamagedError; the chunk is then marked as gone."""
        where = _where(node)
        with self._read() as db:
            row = db.execute("SELECT level, size, digest FROM nodes WHERE id = ?", (node.id,)).fetchone()
            if row is None or row[0] is None or row[0] != node.level:
                raise DamagedError(f"{where} is no longer in {self.path}: its tokens are evaluated again")
            if row[0] not in CODERS and coders.split_level(row[0]) is None:  # of a newer version: not usable here, and not to be removed
                raise DamagedError(f"{where} was written at the level {row[0]!r}, which this version does not know: upgrade seqkv-edge")
            if row[0] not in CODERS and self._predictors(node.context, row[0]) is None:
                raise DamagedError(f"{where} cannot be decoded: its predictors are missing or damaged in {self.path / 'profiles'}; its tokens are evaluated again")
            try:
                return _unpack(self._read_file(chunk_name(node.id, row[0]), row[1], row[2], where))
            except SeqkvError as error:
                self._forget_chunk(node, str(error))
                raise DamagedError(str(error)) from None

    def _read_alone(self, node: Node) -> Chunk:
        """The chunk of a node of a level that looks at no other. Raises DamagedError; the chunk is then marked as gone."""
        extra, coded = self._read_packed(node)
        try:
            assert node.level is not None
            chunk = Chunk(CODERS[node.level].decode(coded, self.context_of(node.context), node.tokens), extra)
            check_chunk(chunk, self.context_of(node.context).layout, len(node.tokens))
            return chunk
        except SeqkvError as error:
            self._forget_chunk(node, str(error))
            raise DamagedError(str(error)) from None

    def _forget_chunk(self, node: Node, why: str) -> None:
        with contextlib.suppress(StoreError):  # of a store that cannot be written; the chunk is not used all the same
            with self._change() as db:
                db.execute("UPDATE nodes SET level = NULL WHERE id = ? AND level = ?", (node.id, node.level))
                self._event(db, f"chunk {node.id.hex()[:16]}", why)
            if node.level is not None:
                self._sweep([chunk_name(node.id, node.level)])

    def restore(self, nodes: Sequence[Node]) -> tuple[list[Chunk], DamagedError | None]:
        """The chunks of a path up to the first damaged one, and what is wrong with that."""
        chunks, error, ends = self._walk(nodes)
        if error is not None:
            return chunks, error
        for level, coder in ends.items():
            self._ends[nodes[0].context, level] = (nodes[-1].id, coder)
        if nodes:
            with contextlib.suppress(StoreError), self._change() as db:  # reading works on a read-only disk too
                db.executemany("UPDATE nodes SET used = ?, hits = hits + 1 WHERE id = ?", [(time.time(), node.id) for node in nodes])
        return chunks, None

    # --- sessions ---

    def lock(self, name: str) -> Lock:
        """The lock of a session (not taken)."""
        return Lock(self.path / "locks" / (blake3_of(check_name(name).encode()).hex()[:32] + ".lock"))

    def locked(self, name: str) -> bool:
        """Whether a session is in use."""
        lock = self.lock(name)
        with self._explained():
            if lock.take():
                lock.free()
                return False
        return True

    _SESSION = "name, context, node, tokens, tail_size, coder, length(coded), n_tokens, data, created, used"

    @staticmethod
    def _info(row: Sequence[Any]) -> SessionInfo:
        name, context, node, tokens, tail_size, coder, coded, n_tokens, data, created, used = row
        try:
            fields = json.loads(data)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise StoreError(f"the session {name!r} is damaged: 'session rm' removes it")
        return SessionInfo(name, context, node, unpack_tokens(tokens), tail_size, coder, coded or 0, n_tokens, fields, created, used)

    def sessions(self) -> list[SessionInfo]:
        """All sessions, the last used first."""
        with self._read() as db:
            return [self._info(row) for row in db.execute(f"SELECT {self._SESSION} FROM sessions ORDER BY used DESC")]

    def find(self, name: str) -> SessionInfo | None:
        with self._read() as db:
            row = db.execute(f"SELECT {self._SESSION} FROM sessions WHERE name = ?", (check_name(name),)).fetchone()
        return None if row is None else self._info(row)

    def session(self, name: str) -> SessionInfo:
        found = self.find(name)
        if found is None:
            raise StoreError(f"there is no session {name!r} in {self.path}: 'session list' shows what there is")
        return found

    def save(
        self, name: str, context: int, node: bytes | None, tail_tokens: Sequence[int], tail: Chunk | None, data: dict[str, Any]
    ) -> None:
        """Write a session's row: its last whole frame, what is behind it, and what the caller needs to know (JSON).

        tail: the state of the tail's tokens, with all exact rows that are held; None: they are evaluated again.
        """
        known, now = self.context_of(context), time.time()
        file = b"" if tail is None else pack_chunk(tail, "raw", known, tail_tokens)
        content = None if tail is None else _content(tail)
        tail_name = None if content is None else f"{content.hex()}.tail"
        with self._change() as db:
            depth = -1
            if node is not None:
                row = db.execute("SELECT depth FROM nodes WHERE id = ?", (node,)).fetchone()
                if row is None:
                    raise StoreError(f"the frames of session {check_name(name)!r} are no longer in the store: another process has removed them")
                depth = row[0]
            old = db.execute("SELECT tail, created FROM sessions WHERE name = ?", (check_name(name),)).fetchone()
            if tail_name is not None and (old is None or old[0] != tail_name):
                self._write(tail_name, file)
            values = (context, node, pack_tokens(tail_tokens), tail_name, len(file), blake3_of(file), content)
            n_tokens = FRAME * (depth + 1) + len(tail_tokens)
            db.execute(
                "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL, ?, ?, ?, ?)",
                (name, *values, n_tokens, json.dumps(data), now if old is None else old[1], now),
            )
        if old is not None and old[0] is not None and old[0] != tail_name:
            self._sweep([old[0]])

    def read_tail(self, info: SessionInfo) -> Chunk | None:
        """The chunk of a session's tail; None: there is none. Raises DamagedError; it is then marked as gone."""
        with self._read() as db:
            row = db.execute("SELECT tail, tail_size, tail_digest FROM sessions WHERE name = ?", (info.name,)).fetchone()
        if row is None or row[0] is None:
            return None
        where = f"the last tokens' chunk of session {info.name!r}"
        try:
            with self._explained():
                data = self._read_file(row[0], row[1], row[2], where)
            return unpack_chunk(data, "raw", self.context_of(info.context), info.tail_tokens)
        except (DamagedError, StateError) as error:
            with contextlib.suppress(StoreError):
                with self._change() as db:
                    db.execute("UPDATE sessions SET tail = NULL, tail_size = 0 WHERE name = ? AND tail = ?", (info.name, row[0]))
                    self._event(db, f"session {info.name}", str(error))
                self._sweep([row[0]])
            raise DamagedError(str(error)) from None

    def tokens(self, info: SessionInfo, decode_model: Callable[[bytes], list[int]] | None = None) -> list[int]:
        """All tokens of a session. decode_model: the decoder of tokens that were coded with a model's probabilities."""
        if info.coder is None:
            found = [token for node in self.path_to(info.node) for token in node.tokens] + list(info.tail_tokens)
        else:
            from . import tokens

            coded = self.coded(info.name)
            if info.coder == "model":
                if decode_model is None:
                    raise StoreError(
                        f"the tokens of session {info.name!r} were coded with the probabilities of {self.context_of(info.context).model_name}: "
                        "open it with that model"
                    )
                found = decode_model(coded)
            else:
                found = tokens.decode(coded)
        if len(found) != info.n_tokens:
            raise StoreError(f"the session {info.name!r} has {len(found)} tokens, expected {info.n_tokens}: 'session verify' looks for damage")
        return found

    def coded(self, name: str) -> bytes:
        with self._read() as db:
            row = db.execute("SELECT coded FROM sessions WHERE name = ?", (name,)).fetchone()
        return bytes(row[0]) if row and row[0] else b""

    def set_coded(self, name: str, coder: str, coded: bytes, n_tokens: int) -> None:
        """Keep a session as coded tokens alone. The caller has verified that they decode. Its frames go unless others need them."""
        with self._change() as db:
            self._release(db, name)
            found = db.execute(
                "UPDATE sessions SET tokens = x'', tail = NULL, tail_size = 0, coder = ?, coded = ?, n_tokens = ? WHERE name = ?",
                (coder, coded, n_tokens, name),
            )
            if not found.rowcount:
                raise StoreError(f"there is no session {name!r} in {self.path}: 'session list' shows what there is")
        self._sweep()

    def make_lossy(self, name: str, profile: Path, kind: str) -> tuple[int, int, int]:
        """Store the frames that only this session has with loss (kind: "lossyKV", coders.Lossy), where they are not yet. They are
        private: no other session starts from them. Returns how many, and their bytes before and after. Raises DamagedError.
        """
        info = self.session(name)
        level, path = self.level(info.context, profile, kind), self.path_to(info.node)
        if level == "raw":
            raise StoreError(f"{profile.name} has no predictors for session {name!r}: 'calibrate --predictors' adds them")
        others = "SELECT 1 FROM nodes WHERE parent = ? AND id != ? UNION ALL SELECT 1 FROM sessions WHERE node = ? AND name != ? LIMIT 1"
        keep, below = len(path), b""
        with self._read() as db:
            while keep and not coders.is_lossy(path[keep - 1].level):
                id_ = path[keep - 1].id
                if db.execute(others, (id_, below, id_, name)).fetchone():
                    break
                keep, below = keep - 1, id_
        chunks, error = self.restore(path)
        if error is not None:
            raise error
        parent = path[keep - 1].id if keep else None
        after = 0
        for node, chunk in zip(path[keep:], chunks[keep:]):
            parent = self.put(info.context, parent, node.tokens, chunk, surprisal=node.surprisal, private=b"lossy", level=level)
            after += self.node(parent).size
        with self._change() as db:
            if db.execute("SELECT node FROM sessions WHERE name = ?", (name,)).fetchone() != (info.node,):
                raise StoreError(f"session {name!r} was changed meanwhile: try again")
            self._release(db, name, keep)
            db.execute("UPDATE sessions SET node = ? WHERE name = ?", (parent, name))
            self._event(db, f"session {name}", f"frames {keep} to {len(path) - 1} were stored with loss ({kind}), as asked for")
        self._sweep()
        return len(path) - keep, sum(node.size for node in path[keep:]), after

    def fork(self, source: str, name: str, n_tokens: int | None = None, data: dict[str, Any] | None = None) -> None:
        """A new session that begins like another: with all of it, or its first n_tokens. Frames are shared.

        The exact rows are those of the end of `source`: a fork from earlier evaluates its last frame again when it is opened.
        """
        info = self.session(source)
        if self.find(name) is not None:
            raise StoreError(f"there is a session {name!r} already: choose another name, or remove it with 'session rm'")
        if n_tokens is None or n_tokens == info.n_tokens:
            with self._change() as db:
                db.execute(
                    "INSERT INTO sessions SELECT ?, context, node, tokens, tail, tail_size, tail_digest, tail_content, coder, coded, "
                    "n_tokens, ?, ?, ? FROM sessions WHERE name = ?",
                    (name, json.dumps(info.data if data is None else data), time.time(), time.time(), source),
                )  # fmt: skip
            return
        if not 0 <= n_tokens <= info.n_tokens:
            raise StoreError(f"session {source!r} has {info.n_tokens} tokens: it cannot be forked at {n_tokens}")
        tokens = self.tokens(info)[:n_tokens]
        path = self.path_to(info.node)[: n_tokens // FRAME]
        self.save(
            name, info.context, path[-1].id if path else None, tokens[FRAME * len(path) :], None, info.data if data is None else data
        )

    def delete(self, name: str) -> int:
        """Remove a session and the frames that no other one needs. Returns the bytes of the files removed."""
        self.session(name)
        if self.locked(name):
            raise StoreError(f"session {name!r} is in use by another process: end that first")
        with self._change() as db:
            self._delete(db, name)
        return self._sweep()[1]

    def _delete(self, db: sqlite3.Connection, name: str) -> None:
        self._release(db, name)
        db.execute("DELETE FROM sessions WHERE name = ?", (name,))

    def _release(self, db: sqlite3.Connection, name: str, n_keep: int = 0) -> None:
        """Cut a session's path to n_keep frames, and delete the nodes behind that no session needs."""
        row = db.execute("SELECT node FROM sessions WHERE name = ?", (name,)).fetchone()
        id_ = row[0] if row else None
        path: list[bytes] = []
        while id_ is not None:
            path.append(id_)
            parent = db.execute("SELECT parent FROM nodes WHERE id = ?", (id_,)).fetchone()
            id_ = parent[0] if parent else None
        path.reverse()
        db.execute("UPDATE sessions SET node = ? WHERE name = ?", (path[n_keep - 1] if n_keep else None, name))
        for id_ in reversed(path[n_keep:]):
            needed = "SELECT 1 FROM nodes WHERE parent = ? UNION ALL SELECT 1 FROM sessions WHERE node = ? LIMIT 1"
            if db.execute(needed, (id_, id_)).fetchone():
                break
            db.execute("DELETE FROM nodes WHERE id = ?", (id_,))

    def _drop_unused(self, db: sqlite3.Connection, before: float) -> int:
        """Delete nodes that no session needs and that were last used before a time: younger ones may be a session being loaded."""
        db.execute(
            "WITH RECURSIVE live(id) AS (SELECT node FROM sessions WHERE node IS NOT NULL UNION SELECT id FROM nodes WHERE used >= ? UNION "
            "SELECT parent FROM nodes JOIN live ON nodes.id = live.id WHERE parent IS NOT NULL) "
            "DELETE FROM nodes WHERE id NOT IN live", (before,),
        )  # fmt: skip
        return int(db.execute("SELECT changes()").fetchone()[0])

    # --- size and policy ---

    def bytes(self) -> int:
        """Bytes of the store's chunks and index."""
        with self._read() as db:
            (chunks,) = db.execute("SELECT coalesce(sum(size), 0) FROM nodes WHERE level IS NOT NULL").fetchone()
            (tails,) = db.execute("SELECT coalesce(sum(tail_size), 0) FROM sessions").fetchone()
            pages = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")]
        return int(chunks + tails + (pages[0] - pages[1]) * pages[2])

    def _event(self, db: sqlite3.Connection, what: str, why: str) -> None:
        db.execute("INSERT INTO events VALUES (?, ?, ?)", (time.time(), what, why))
        db.execute("DELETE FROM events WHERE rowid <= (SELECT max(rowid) FROM events) - ?", (_MAX_EVENTS,))

    def events(self, what: str | None = None) -> list[tuple[float, str, str]]:
        """What the store did by itself, in order: (time, what, why)."""
        with self._read() as db:
            rows = db.execute("SELECT time, what, why FROM events ORDER BY rowid").fetchall()
        return [row for row in rows if what is None or row[1] == what]

    def gc(self, limit: int | None = None, *, grace: float = 600.0) -> Removed:
        """Remove what no session has needed for `grace` seconds; with a limit (bytes), degrade what is worth least until the store fits
        (policy.py). What a session in use needs is never touched."""
        from . import policy

        before = self.bytes()
        with self._change() as db:
            n_nodes = self._drop_unused(db, time.time() - grace)
        done = policy.shrink(self, limit) if limit is not None and self.bytes() > limit else Removed()
        n_files, _ = self._sweep()
        if n_nodes or done != Removed():
            self.compact()
        return replace(done, nodes=n_nodes, files=n_files, bytes=before - self.bytes())

    def compact(self) -> None:
        """Give back what deleted rows took; later if another process is busy."""
        with self._lock, self._explained(), contextlib.suppress(sqlite3.OperationalError):
            self.db.execute("VACUUM")

    # --- verify ---

    def verify(self) -> list[Problem]:
        """Read everything and compare it with its checksums. Damaged chunks are marked as gone, so that they are made again."""
        problems: list[Problem] = []
        with self._read() as db:
            for (text,) in db.execute("PRAGMA integrity_check").fetchall():
                if text != "ok":
                    problems.append(Problem("index.sqlite", text))
        nodes = {node.id: node for node in self.nodes()}
        for node in nodes.values():
            where = f"chunk {node.id.hex()[:16]}"
            with self._read() as db:
                (address,) = db.execute("SELECT address FROM nodes WHERE id = ?", (node.id,)).fetchone() or (None,)
            if node.parent is not None and node.parent not in nodes:
                problems.append(Problem(where, "its parent is missing"))
            elif address is not None and address != address_of(node.parent, self.context_of(node.context).key, node.tokens):
                problems.append(Problem(where, "its tokens are not those of its address"))
            if node.level is not None and node.level in CODERS:
                try:
                    self._read_alone(node)
                except DamagedError as error:
                    problems.append(Problem(where, str(error)))
        parents = {node.parent for node in nodes.values()}
        found: set[str] = set()
        for leaf in nodes.values():  # the other levels, path by path
            path = [] if leaf.id in parents else self.path_to(leaf.id)
            path = path[: next((i for i, node in enumerate(path) if node.level is None), len(path))]
            if any(node.level not in CODERS for node in path):
                chunks, error, _ = self._walk(path)
                if error is not None and str(error) not in found:
                    found.add(str(error))
                    problems.append(Problem(f"chunk {path[len(chunks)].id.hex()[:16]}", str(error)))
        for info in self.sessions():
            where = f"session {info.name}"
            try:
                self.read_tail(info)
                if info.coder != "model":
                    self.tokens(info)
            except StoreError as error:
                problems.append(Problem(where, str(error)))
        return problems

    # --- surprisal ---

    def distance(self, a: str, b: str) -> tuple[float, int, int]:
        """The trie metric of two sessions, -log2 P(common prefix): (bits, tokens of the prefix, tokens whose bits are known).

        Frames whose logits were not at hand count only in the second number; with all known the sum is exact.
        """
        first, second = (self.path_to(self.session(name).node) for name in (a, b))
        common = [x for x, y in zip(first, second) if x.id == y.id]
        return sum(n.surprisal.bits for n in common), FRAME * len(common), sum(n.surprisal.n for n in common)


def _where(node: Node) -> str:
    return f"the chunk of tokens {FRAME * node.depth} to {FRAME * node.depth + FRAME - 1}"


def chunk_name(id_: bytes, level: str) -> str:
    return f"{id_.hex()}.{level}"
