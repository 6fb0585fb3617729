"""The store without a model: against a dict, under faults, with hostile files; and the adaptive coder of token ids."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_delta import small_coder, write_profile

from seqkv_edge import cli, coders, exchange, manage, profile, tokens
from seqkv_edge.errors import DamagedError, SeqkvError, StoreError
from seqkv_edge.state import FRAME, Chunk, Layout, RowType
from seqkv_edge.store import CODERS, VERSION, Identity, Store, Surprisal, check_name, pack_chunk, unpack_chunk

resource = pytest.importorskip("resource", reason="POSIX alone")
ROOT = Path(__file__).resolve().parents[1]
ROW = RowType("seqkv3", 25, 64)
LAYOUT = Layout((ROW, ROW), (ROW, ROW), b"")


def identity(model: str = "m" * 32) -> Identity:
    return Identity(model, "tiny.gguf", "seqkv3", "00", LAYOUT)


def chunk(n: int, seed: int, n_exact: int = 0) -> Chunk:
    rng = np.random.default_rng(seed)
    extra = np.arange(n, dtype=np.uint8).tobytes() + np.uint32(n_exact).tobytes() + np.arange(n_exact, dtype=np.uint32).tobytes()
    extra += np.arange(n_exact, dtype=np.int32).tobytes() + rng.bytes(n_exact * LAYOUT.exact_bytes)
    return Chunk(rng.bytes(n * LAYOUT.row_bytes), extra)


def frame(seed: int) -> list[int]:
    return np.random.default_rng(1000 + seed).integers(0, 50000, FRAME).tolist()


def fill(store: Store, name: str, seeds: list[int], n_tail: int = 5, context: int | None = None) -> list[bytes]:
    """A session whose frames are those of the seeds; their chunks depend on the whole path."""
    context = store.context(identity()) if context is None else context
    ids: list[bytes] = []
    for i, seed in enumerate(seeds):
        ids.append(store.put(context, ids[-1] if ids else None, frame(seed), chunk(FRAME, hash_path(seeds[: i + 1]), 4 if i == 0 else 0)))
    store.save(name, context, ids[-1] if ids else None, list(range(n_tail)), chunk(n_tail, 77, 3), {"note": name})
    return ids


def hash_path(seeds: list[int]) -> int:
    value = 0
    for seed in seeds:
        value = (value * 31 + seed + 1) % (1 << 31)
    return value


class Coded:
    """Frames of random blocks in a cache whose profile has predictors, and the level that they are coded at."""

    def __init__(self, store: Store) -> None:
        coder = small_coder()
        rows = [layer.rows(k, v) for layer, k, v in zip(coder.layers, coder.k_bits, coder.v_bits)]
        k, v = (
            tuple(RowType(f"seqkv{b}{plan}", row[i], 128) for b, row in zip(bits, rows))
            for i, (bits, plan) in enumerate(((coder.k_bits, "k"), (coder.v_bits, "")))
        )
        self.identity = Identity("m" * 32, "tiny.gguf", "seqkv3", "00", Layout(k, v, b""))
        self._rows = rows
        self.profile = store.path / "tiny.seqkv.gguf"
        if not self.profile.is_file():  # complete under its name: other processes read it
            own = self.profile.with_name(f"{os.getpid()}.gguf")
            write_profile(own)
            profile.add_predictors(own, dict(enumerate(coder.layers)))
            os.replace(own, self.profile)
        self.context = store.context(self.identity)
        self.level = store.level(self.context, self.profile)
        assert self.level.startswith("small-")

    def chunk(self, seed: int) -> Chunk:
        rng, parts = np.random.default_rng(seed), []
        for (k, v), b in zip(self._rows, (3, 2, 4)):
            keys = rng.integers(0, 256, (FRAME, k)).astype(np.uint8)
            keys.reshape(-1, 2 + 8 * b)[:, 1] &= 0x7F
            parts += [keys.tobytes(), rng.bytes(FRAME * v)]
        return Chunk(b"".join(parts), np.arange(FRAME, dtype=np.uint8).tobytes() + bytes(4))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "s") as opened:
        yield opened


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# --- against a dict ---


class StoreMachine(RuleBasedStateMachine):
    """Any order of operations gives what a dict of sessions would."""

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.folder.name) / "s")
        self.context = self.store.context(identity())
        self.model: dict[str, tuple[list[int], int]] = {}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()

    names = st.sampled_from(["a", "b", "c d", "ü"])
    paths = st.lists(st.integers(0, 2), max_size=5)

    @rule(name=names, seeds=paths, n_tail=st.integers(0, 63))
    def save(self, name: str, seeds: list[int], n_tail: int) -> None:
        fill(self.store, name, seeds, n_tail, self.context)
        self.model[name] = (seeds, n_tail)

    @rule(name=names, new=names)
    def fork(self, name: str, new: str) -> None:
        if name not in self.model or new in self.model:
            with pytest.raises(StoreError):
                self.store.fork(name, new)
            return
        self.store.fork(name, new)
        self.model[new] = self.model[name]

    @rule(name=names, new=names, share=st.floats(0, 1))
    def fork_earlier(self, name: str, new: str, share: float) -> None:
        if name not in self.model or new in self.model:
            return
        seeds, _ = self.model[name]
        n = int(share * len(seeds))
        self.store.fork(name, new, n * FRAME)
        self.model[new] = (seeds[:n], self.model[name][1] if n == len(seeds) and self.model[name][1] == 0 else 0)

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name not in self.model:
            with pytest.raises(StoreError):
                self.store.delete(name)
            return
        self.store.delete(name)
        del self.model[name]

    @rule()
    def gc(self) -> None:
        self.store.gc(grace=0)
        wanted = {tuple(seeds[: i + 1]) for seeds, _ in self.model.values() for i in range(len(seeds))}
        assert len(self.store.nodes()) == len(wanted)
        on_disk = [p for p in self.store.chunks.glob("*/*")]
        assert len(on_disk) <= len(wanted) + len(self.model)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store(Path(self.folder.name) / "s")
        self.context = self.store.context(identity())

    @rule(seeds=paths)
    def prefix(self, seeds: list[int]) -> None:
        ids = [t for seed in seeds for t in frame(seed)]
        found = self.store.longest_prefix(self.context, ids + [1, 2, 3])
        least = max((common(seeds, other) for other, _ in self.model.values()), default=0)
        assert least <= len(found) <= len(seeds)
        chunks, error = self.store.restore(found)
        assert error is None
        assert chunks == [chunk(FRAME, hash_path(seeds[: i + 1]), 4 if i == 0 else 0) for i in range(len(found))]

    @invariant()
    def holds_what_the_dict_says(self) -> None:
        if not hasattr(self, "store"):
            return
        assert sorted(info.name for info in self.store.sessions()) == sorted(self.model)
        for info in self.store.sessions():
            seeds, n_tail = self.model[info.name]
            assert self.store.tokens(info) == [t for seed in seeds for t in frame(seed)] + list(range(n_tail))
            path = self.store.path_to(info.node)
            assert [n.tokens for n in path] == [tuple(frame(seed)) for seed in seeds]


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


# --- frames ---


def test_shared_frames_are_stored_once(store):
    fill(store, "a", [0, 1, 2])
    before = store.bytes()
    fill(store, "b", [0, 1, 3], n_tail=0)
    assert len(store.nodes()) == 4
    assert store.bytes() - before < 2 * (FRAME * LAYOUT.row_bytes + 4096) + 8192


def test_other_bytes_of_the_same_tokens_are_a_variant(store):
    context = store.context(identity())
    first = store.put(context, None, frame(0), chunk(FRAME, 1))
    second = store.put(context, None, frame(0), chunk(FRAME, 2))
    assert first != second and store.put(context, None, frame(0), chunk(FRAME, 2)) == second
    deeper = store.put(context, second, frame(1), chunk(FRAME, 3))
    path = store.longest_prefix(context, frame(0) + frame(1))
    assert [n.id for n in path] == [second, deeper]
    assert store.read_chunk(store.node(first)) == chunk(FRAME, 1) and store.read_chunk(store.node(second)) == chunk(FRAME, 2)


class Zlib:
    """A coder that needs to know the tokens."""

    def encode(self, blocks: bytes, identity: Identity, tokens) -> bytes:
        return bytes([tokens[0] % 251]) + zlib.compress(blocks)

    def decode(self, coded: bytes, identity: Identity, tokens) -> bytes:
        if coded[:1] != bytes([tokens[0] % 251]):
            raise DamagedError("coded with other tokens")
        return zlib.decompress(coded[1:])


def test_levels(store, monkeypatch):
    """Frames of several levels in one path; the same frame is not stored again at another level."""
    monkeypatch.setitem(CODERS, "zlib", Zlib())
    context = store.context(identity())
    plain = Chunk(bytes(FRAME * LAYOUT.row_bytes), chunk(FRAME, 1).extra)
    first = store.put(context, None, frame(0), plain, level="zlib")
    second = store.put(context, first, frame(1), chunk(FRAME, 2))
    assert store.put(context, None, frame(0), plain) == first and store.node(first).level == "zlib"
    assert store.node(first).size < FRAME * LAYOUT.row_bytes / 4
    store.save("a", context, second, [], None, {})
    assert store.restore(store.path_to(second)) == ([plain, chunk(FRAME, 2)], None) and store.verify() == []
    monkeypatch.delitem(CODERS, "zlib")
    with pytest.raises(DamagedError, match="upgrade"):
        store.read_chunk(store.node(first))
    monkeypatch.setitem(CODERS, "zlib", Zlib())
    assert store.read_chunk(store.node(first)) == plain  # nothing was removed


def test_contexts_are_apart(store):
    a, b = store.context(identity()), store.context(identity("n" * 32))
    assert a != b and store.context(identity()) == a
    renamed = Identity("m" * 32, "renamed.gguf", "seqkv3", "00", LAYOUT)
    assert store.context(renamed) == a  # a file's name is no part of it
    assert store.context(Identity("m" * 32, "tiny.gguf", "seqkv3", "01", LAYOUT)) != a
    assert store.context(Identity("m" * 32, "tiny.gguf", "seqkv3", "00", LAYOUT, "lora")) != a
    store.put(a, None, frame(0), chunk(FRAME, 1))
    assert store.longest_prefix(b, frame(0)) == []


def test_private_frames_are_not_found(store):
    context = store.context(identity())
    private = store.put(context, None, frame(0), chunk(FRAME, 1), private=b"x")
    child = store.put(context, private, frame(1), chunk(FRAME, 2))
    assert store.longest_prefix(context, frame(0)) == [] and store.node(child).private
    public = store.put(context, None, frame(0), chunk(FRAME, 1))
    assert public != private and [n.id for n in store.longest_prefix(context, frame(0))] == [public]


def test_surprisal_and_distance(store):
    context = store.context(identity())
    a = store.put(context, None, frame(0), chunk(FRAME, 1), surprisal=Surprisal(10.0, 10))
    store.put(context, None, frame(0), chunk(FRAME, 1), surprisal=Surprisal(300.0, 64))
    store.put(context, None, frame(0), chunk(FRAME, 1), surprisal=Surprisal(1.0, 3))
    assert store.node(a).surprisal == Surprisal(300.0, 64)
    b, c = (store.put(context, a, frame(i), chunk(FRAME, i), surprisal=Surprisal(5.0, 1)) for i in (1, 2))
    store.save("b", context, b, [], None, {})
    store.save("c", context, c, [], None, {})
    assert store.distance("b", "c") == (300.0, 64, 64) and store.distance("b", "b") == (305.0, 128, 65)


# --- size ---


def test_policy_keeps_what_is_shared_and_recent(store):
    ids = {name: fill(store, name, seeds) for name, seeds in (("old", [0, 1, 2, 3]), ("one", [0, 1, 4, 5]), ("two", [0, 1, 6, 7]))}
    with store._change() as db:
        db.execute("UPDATE sessions SET used = used - 30*86400 WHERE name = 'old'")
        db.execute("UPDATE nodes SET used = used - 30*86400 WHERE id IN (?, ?)", ids["old"][2:])
    size = store.node(ids["one"][0]).size
    removed = store.gc(store.bytes() - size)
    assert removed.chunks >= 1 and store.node(ids["one"][3]).level == "raw"
    assert store.session("old").coder == "adaptive" and store.tokens(store.session("old"))[:64] == frame(0)
    assert all(store.node(i).level for name in ("one", "two") for i in ids[name])
    assert any(what == "session old" for _, what, _ in store.events())
    # what is left goes in the end, and never more than asked
    store.gc(0)
    assert store.sessions() == [] and store.nodes() == [] and not list(store.chunks.glob("*/*"))


def test_tokens_survive_degrading(store):
    expected = [t for seed in range(6) for t in frame(seed)] + list(range(9))
    fill(store, "a", list(range(6)), n_tail=9)
    fill(store, "keep", [9])
    for limit in range(store.bytes(), 60_000, -4000):
        store.gc(limit)
        if store.find("a") is None:
            break
        assert store.tokens(store.session("a")) == expected
    assert store.verify() == []


# --- faults ---


@pytest.mark.parametrize("n", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_each_chunk(store, n):
    ids = fill(store, "a", list(range(n)))
    rng = np.random.default_rng(3)
    for id_ in ids:
        file = store._file(f"{id_.hex()}.raw")
        data = bytearray(file.read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(data)
    for id_ in ids:
        node = store.node(id_)
        with pytest.raises(DamagedError) as error:
            store.read_chunk(node)
        assert "evaluated again" in one_line(error)
        assert store.node(id_).level is None  # never used again
    assert store.longest_prefix(store.context(identity()), frame(0)) == []
    assert fill(store, "a", list(range(n))) == ids  # made again
    assert store.verify() == []


@pytest.mark.parametrize("n", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_each_coded_chunk(store, n):
    """Each alone, in sessions of ten frames: what is before it is there, it and what is coded from it is not, until it is made again."""
    coded, rng = Coded(store), np.random.default_rng(3)
    for session in range(n // 10):
        ids: list[bytes] = []

        def put(i: int) -> bytes:
            parent = ids[i - 1] if i else None
            return store.put(coded.context, parent, frame(session * 10 + i), coded.chunk(session * 10 + i), level=coded.level)

        for i in range(10):
            ids.append(put(i))
        expected = [coded.chunk(session * 10 + i) for i in range(10)]
        for i in range(10):
            file = store._file(f"{ids[i].hex()}.{coded.level}")
            data = bytearray(file.read_bytes())
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            file.write_bytes(data)
            chunks, error = store.restore(store.path_to(ids[-1]))
            assert chunks == expected[:i] and isinstance(error, DamagedError) and "evaluated again" in str(error)
            assert store.node(ids[i]).level is None
            assert put(i) == ids[i]
        chunks, error = store.restore(store.path_to(ids[-1]))
        assert chunks == expected and error is None
    assert store.verify() == []


def test_frames_with_loss(store):
    """Those that no other session needs come back as quantizing them twice gives them; the rest, and other sessions, stay as they were."""
    coded = Coded(store)
    ids: dict[str, list[bytes]] = {"a": [], "b": []}
    for name, seeds in (("a", [0, 1, 2, 3, 4]), ("b", [0, 1, 7])):
        for i, seed in enumerate(seeds):
            parent = ids[name][i - 1] if i else None
            ids[name].append(store.put(coded.context, parent, frame(seed), coded.chunk(seed), level=coded.level))
        store.save(name, coded.context, ids[name][-1], [5, 6], None, {})
    n, before, after = store.make_lossy("a", coded.profile, "lossy12")
    assert n == 3 and after < 0.8 * before
    path = store.path_to(store.session("a").node)
    assert [x.id for x in path[:2]] == ids["a"][:2] == ids["b"][:2] and store.path_to(store.session("b").node)[-1].id == ids["b"][-1]
    assert [x.private for x in path] == [False] * 2 + [True] * 3 and [x.tokens for x in path] == [tuple(frame(i)) for i in range(5)]
    twice = coders.path_coder(coders.predictors(coded.profile, coded.identity.layout), "lossy12")
    expected = [coded.chunk(i) for i in range(2)] + [Chunk(twice.stored(coded.chunk(i).blocks), coded.chunk(i).extra) for i in range(2, 5)]
    for again in (store, Store(store.path)):  # by a coder that has written, and by one that has not
        chunks, error = again.restore(path)
        assert chunks == expected and error is None and again.verify() == []
    after_it = store.put(coded.context, path[-1].id, frame(9), coded.chunk(9), level=coded.level, session="a")  # it goes on, exact
    assert store.node(after_it).private and Store(store.path).read_chunk(store.node(after_it)) == coded.chunk(9)
    assert len(store.longest_prefix(coded.context, [t for i in range(5) for t in frame(i)])) == 2
    assert store.make_lossy("a", coded.profile, "lossy12")[0] == 1 and store.make_lossy("a", coded.profile, "lossy22")[0] == 0


@pytest.mark.parametrize("n", [0, 1, 3, 100, -1])
def test_truncated_and_missing_files(store, n):
    ids = fill(store, "a", [0, 1, 2])
    for file in (store._file(f"{ids[1].hex()}.raw"), next(store.chunks.glob("*/*.tail"))):
        if n < 0:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:n])
    chunks, error = store.restore(store.path_to(ids[2]))
    assert len(chunks) == 1 and isinstance(error, DamagedError)
    with pytest.raises(DamagedError):
        store.read_tail(store.session("a"))
    assert store.read_tail(store.session("a")) is None
    assert store.tokens(store.session("a"))[:128] == frame(0) + frame(1)


def test_verify_reports_damage(store, capsys):
    ids = fill(store, "a", [0, 1, 2])
    assert cli.main(["session", "verify", "--store", str(store.path)]) == 0
    store._file(f"{ids[1].hex()}.raw").write_bytes(b"nothing")
    assert cli.main(["session", "verify", "--store", str(store.path)]) == 1
    assert "damaged" in capsys.readouterr().out


def test_a_newer_or_foreign_database_is_refused(tmp_path):
    Store(tmp_path / "s").close()
    db = sqlite3.connect(tmp_path / "s" / "index.sqlite")
    db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    with pytest.raises(StoreError) as error:
        Store(tmp_path / "s")
    assert "upgrade" in one_line(error)
    (tmp_path / "t").mkdir()
    db = sqlite3.connect(tmp_path / "t" / "index.sqlite")
    db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(StoreError) as error:
        Store(tmp_path / "t")
    assert "something else" in one_line(error)
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "index.sqlite").write_bytes(os.urandom(5000))
    with pytest.raises(StoreError) as error:
        Store(tmp_path / "u")
    assert "damaged" in one_line(error)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError):
        Store(tmp_path / "file")


def test_a_full_disk_loses_nothing(tmp_path):
    """Writes of more than some bytes fail, as on a full disk, for chunks and for the index."""
    with Store(tmp_path / "s") as store:
        ids = fill(store, "a", [0, 1])
        before = [(n.id, n.size) for n in store.nodes()]
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            with pytest.raises(StoreError) as error:
                store.put(store.context(identity()), ids[-1], frame(2), chunk(FRAME, 5))
            assert "free some space" in one_line(error)
            with pytest.raises(StoreError) as error:
                store.save("b", store.context(identity()), None, [1, 2], None, {"x": "y" * 50_000})
            one_line(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert [(n.id, n.size) for n in store.nodes()] == before and store.verify() == []
        assert not list(store.chunks.glob("*/*.tmp"))
        assert store.put(store.context(identity()), ids[-1], frame(2), chunk(FRAME, 5))


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_read_only_directory(tmp_path):
    """As another user, since root may write anywhere."""
    path = tmp_path / "s"
    with Store(path) as store:
        fill(store, "a", [0, 1])
    script = (
        "import os, sys, blake3\nfrom seqkv_edge.store import Store\nfrom seqkv_edge.errors import StoreError\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"try:\n    s = Store({str(path)!r})\n    s.save('b', 1, None, [], None, {{}})\n"
        "except StoreError as e: print(e)\nelse: print('written')\n"
    )
    for file in (path, *path.rglob("*")):
        file.chmod(0o555 if file.is_dir() else 0o444)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.name.startswith("pytest"):
            parent.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    for file in (path, *path.rglob("*")):
        file.chmod(0o755 if file.is_dir() else 0o644)
    assert "writable" in done.stdout and done.stdout.count("\n") == 1, done.stderr
    with Store(path) as store:
        assert store.verify() == [] and store.find("a")


WRITER = """
import sys
sys.path.insert(0, sys.argv[1] + '/tests'); sys.path.insert(0, sys.argv[1])
import test_store as t
from seqkv_edge.store import Store
with Store(sys.argv[2]) as store:
    context, make, level = t.kind(store, sys.argv[6])
    seed, name = int(sys.argv[3]), sys.argv[4]
    path, seeds = [], []
    print('start', flush=True)
    for i in range(int(sys.argv[5])):
        seeds.append(i if i < 10 else seed * 1000 + i)
        path.append(store.put(context, path[-1] if path else None, t.frame(seeds[-1]), make(t.hash_path(seeds)), level=level,
                              session=name if path else None))
        if i == 0:
            store.save(name, context, path[-1], [], None, {})
        print(i + 1, flush=True)
"""


def kind(store: Store, name: str) -> tuple[int, Callable[[int], Chunk], str]:
    """Context, chunks by seed and level of frames that are stored "raw" or "coded"."""
    if name == "raw":
        return store.context(identity()), lambda seed: chunk(FRAME, seed), "raw"
    coded = Coded(store)
    return coded.context, coded.chunk, coded.level


def writer(path: Path, seed: int, name: str, n: int, how: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", WRITER, str(ROOT), str(path), str(seed), name, str(n), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def check_written(store: Store, name: str, seed: int, least: int, how: str) -> int:
    info = store.find(name)
    if info is None:
        assert least <= 1
        return 0
    path = store.path_to(info.node)
    seeds = [i if i < 10 else seed * 1000 + i for i in range(len(path))]
    assert len(path) >= least and [list(n.tokens) for n in path] == [frame(s) for s in seeds]
    chunks, error = store.restore(path)
    make = kind(store, how)[1]
    assert error is None and chunks == [make(hash_path(seeds[: i + 1])) for i in range(len(path))]
    return len(path)


@pytest.mark.parametrize("how", ["raw", "coded"])
@pytest.mark.parametrize("n", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_at_random_points(tmp_path, n, how):
    rng = np.random.default_rng(11)
    seen = []
    for i in range(n):
        process = writer(tmp_path / "s", i, f"n{i}", 3000, how)
        assert process.stdout
        process.stdout.readline()
        time.sleep(float(rng.uniform(0, 0.25)))
        os.kill(process.pid, signal.SIGKILL)
        lines = process.stdout.read().split()
        process.wait()
        with Store(tmp_path / "s") as store:
            seen.append(check_written(store, f"n{i}", i, int(lines[-1]) if lines else 0, how))
            if i % 10 == 9 or i + 1 == n:
                assert store.verify() == []
                if n > 100:
                    store.gc(20_000_000, grace=0)
    assert len(set(seen)) > 4  # it was killed in the middle
    with Store(tmp_path / "s") as store:
        store.gc(grace=0)
        assert {p.name for p in store.chunks.glob("*/*")} == store._known_files(store.db)


def test_two_processes_on_one_store(tmp_path):
    Store(tmp_path / "s").close()
    processes = [writer(tmp_path / "s", i, f"p{i}", 60, "raw") for i in range(2)]
    with Store(tmp_path / "s") as store:  # a third, which collects garbage meanwhile
        while any(p.poll() is None for p in processes):
            store.gc()
            time.sleep(0.01)
        for i, process in enumerate(processes):
            assert process.stdout and process.wait() == 0
            assert check_written(store, f"p{i}", i, 60, "raw") == 60
        assert store.verify() == [] and len(store.nodes()) == 10 + 2 * 50  # the first ten are shared


# --- one session as a file ---


def exported(store: Store, tmp_path: Path) -> bytes:
    fill(store, "a", [0, 1, 2])
    exchange.export_session(store, "a", tmp_path / "a.session")
    return (tmp_path / "a.session").read_bytes()


def test_import_gives_what_was_exported(store, tmp_path):
    data = exported(store, tmp_path)
    with Store(tmp_path / "t") as other:
        assert exchange.import_session(other, tmp_path / "a.session", "b") == "b"
        info = other.session("b")
        assert other.tokens(info) == store.tokens(store.session("a")) and info.data == {"note": "a"}
        assert other.read_tail(info) == chunk(5, 77, 3)
        chunks, _ = other.restore(other.path_to(info.node))
        assert chunks == store.restore(store.path_to(store.session("a").node))[0]
    assert len(data) < store.bytes()


def test_hostile_imports(store, tmp_path):
    data = exported(store, tmp_path)
    rng = np.random.default_rng(7)
    cases = [b"", b"x", data[:7], data[:12], data[: len(data) // 2], data[:-1], data + b"x", rng.bytes(1000)]
    cases.append(data[:8] + b"\xff\xff\xff\xff" + data[12:])  # a header of 4 GB
    for _ in range(60):
        bad = bytearray(data)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        cases.append(bytes(bad))
    with Store(tmp_path / "t") as other:
        for case in cases:
            (tmp_path / "bad").write_bytes(case)
            with pytest.raises(StoreError) as error:
                exchange.import_session(other, tmp_path / "bad")
            one_line(error)
            assert other.sessions() == []


def reheaded(data: bytes, change) -> bytes:
    """The file with another header, its checksum right: what an attacker would write."""
    import json
    import struct

    from blake3 import blake3

    (n,) = struct.unpack("<I", data[8:12])
    header = json.loads(data[12 : 12 + n])
    change(header)
    text = json.dumps(header).encode()
    head = data[:8] + struct.pack("<I", len(text)) + text
    return head + blake3(head).digest() + data[12 + n + 32 :]


def test_hostile_headers(store, tmp_path):
    data = exported(store, tmp_path)
    import json

    def context(change):
        def apply(header):
            inner = json.loads(header["context"])
            change(inner)
            header["context"] = json.dumps(inner)

        return apply

    changes = [
        lambda h: h.update(n_tokens=1 << 40), lambda h: h.update(n_tokens=-1), lambda h: h.update(n_tokens="x"), lambda h: h.update(n_tokens=True),
        lambda h: h["frames"][0].update(size=1 << 50), lambda h: h["frames"][0].update(size=-5), lambda h: h["frames"][0].update(size=None),
        lambda h: h["frames"].append(h["frames"][0]), lambda h: h.update(frames=h["frames"] * 100_000), lambda h: h.update(frames={}),
        lambda h: h.update(tail={"size": 1 << 60, "blake3": ""}), lambda h: h.update(name="../../etc/passwd"), lambda h: h.update(name=5),
        lambda h: h.update(data=[]), lambda h: h.update(data={"messages": [{"role": "root", "content": 3}]}), lambda h: h.pop("context"),
        lambda h: h["frames"][0].update(bits="x"), lambda h: h["frames"][0].update(bits=float("nan")), lambda h: h["frames"][0].update(n_bits=1e400),
        context(lambda c: c["layout"]["k"][0].__setitem__(1, 1 << 40)), context(lambda c: c["layout"].update(k=[])), context(lambda c: c.clear()),
        context(lambda c: c["layout"]["k"][0].__setitem__(1, 24)), context(lambda c: c["layout"].update(header="zz")),
    ]  # fmt: skip
    with Store(tmp_path / "t") as other:
        for i, change in enumerate(changes):
            (tmp_path / "bad").write_bytes(reheaded(data, change))
            with pytest.raises(StoreError) as error:
                exchange.import_session(other, tmp_path / "bad")
            one_line(error)
            assert other.sessions() == [], i
        (tmp_path / "good").write_bytes(reheaded(data, lambda h: h.update(name="good")))
        assert exchange.import_session(other, tmp_path / "good") == "good"


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_as_a_chunk(data):
    try:
        found = unpack_chunk(data, "raw", identity(), frame(0))
    except SeqkvError:
        return
    assert pack_chunk(found, "raw", identity(), frame(0)) == data


# --- names, commands ---


def test_names():
    for name in ("a", "my chat", "ü-1", "x" * 100):
        assert check_name(name) == name
    for name in ("", " a", "a/b", "..\\x", "x" * 101, "a\nb", "a\0"):
        with pytest.raises(StoreError):
            check_name(name)


def test_commands(store, tmp_path, capsys):
    import json

    fill(store, "a", [0, 1, 2])
    fill(store, "b", [0, 1, 3])
    where = ["--store", str(store.path)]

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(["session", *args, *where])
        return status, *capsys.readouterr()

    status, out, _ = run("list", "--json")
    assert status == 0 and {s["name"]: s["tokens"] for s in json.loads(out)["sessions"]} == {"a": 197, "b": 197}
    status, out, _ = run("show", "--json")
    found = json.loads(out)["segments"]
    assert [(s["from"], s["tokens"], sorted(s["sessions"])) for s in found] == [(0, 128, ["a", "b"]), (128, 64, ["a"]), (128, 64, ["b"])]
    assert run("show", "--why")[0] == 0
    status, out, _ = run("show", "a")
    assert status == 0 and "d_T to b: 128 tokens in common, 0 bits in the 0 whose logits" in out
    assert json.loads(run("show", "a", "--json")[1])["shared"] == [{"name": "b", "tokens": 128, "bits": 0.0, "bits_known_tokens": 0}]
    assert run("export", "a", str(tmp_path / "f"))[0] == 0 and run("import", str(tmp_path / "f"), "--name", "c")[0] == 0
    assert run("fork", "a", "d")[0] == 0 and run("gc")[0] == 0 and run("rm", "c", "d")[0] == 0
    assert [i.name for i in store.sessions()] and len(store.nodes()) == 4
    status, out, err = run("rm", "none")
    assert status == 1 and "no session 'none'" in err and err.count("\n") == 1
    assert cli.main(["session", "list", "--store", str(tmp_path / "nothing")]) == 1
    assert "no session store" in capsys.readouterr().err and not (tmp_path / "nothing").exists()
    lock = store.lock("a")
    assert lock.take()
    assert run("rm", "a")[0] == 1
    lock.free()


def test_plot(store, tmp_path):
    pytest.importorskip("matplotlib")
    fill(store, "a", [0, 1, 2])
    fill(store, "b", [0, 1, 3])
    manage.plot(manage.segments(store), tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


# --- tokens ---


@given(st.lists(st.integers(0, 2**32 - 1), max_size=300))
@settings(max_examples=150, deadline=None)
def test_any_tokens_survive_coding(ids):
    assert tokens.decode(tokens.encode(ids)) == ids


@given(st.lists(st.sampled_from([0, 1, 7, 49151, 2**18 - 1]), max_size=2000))
@settings(max_examples=50, deadline=None)
def test_repetitive_tokens_survive_coding(ids):
    assert tokens.decode(tokens.encode(ids)) == ids


def test_coded_sizes():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 49152, 20000).tolist()
    assert len(tokens.encode(noise)) * 8 / 20000 < np.log2(49152) * 1.25
    assert len(tokens.encode(noise[:1000] * 20)) * 8 / 20000 < 1.2  # the copies cost little
    zipf = np.minimum(rng.zipf(1.3, 50000), 49151).tolist()
    entropy = -sum(p * np.log2(p) for p in np.unique(zipf, return_counts=True)[1] / 50000)
    assert len(tokens.encode(zipf)) * 8 / 50000 < 1.15 * entropy
    assert tokens.decode(tokens.encode(zipf)) == zipf
    assert tokens.encode([]) and tokens.decode(tokens.encode([])) == []


def test_damaged_tokens():
    coded = tokens.encode(list(range(500)) * 3)
    rng = np.random.default_rng(1)
    for _ in range(300):
        bad = bytearray(coded)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        if tokens_or_none(bytes(bad)) is not None:
            assert tokens_or_none(bytes(bad)) == tokens.decode(coded)  # bits behind the end of the code
    for n in range(14):
        assert tokens_or_none(coded[:n]) is None
    assert tokens_or_none(b"\x01\x01\xff\xff\xff\x07" + b"\0" * 8) is None  # 134 million ids of nothing
    for bad in ([-1], [1 << 32]):
        with pytest.raises(StoreError):
            tokens.encode(bad)


def tokens_or_none(data: bytes) -> list[int] | None:
    try:
        return tokens.decode(data)
    except StoreError:
        return None


@pytest.mark.model
def test_bits_of_english_and_a_megabyte_of_everything():
    from seqkv_edge import calibrate, model
    from seqkv_edge.engine import open_model

    rng = np.random.default_rng(6)
    emoji = "".join(chr(c) for c in rng.integers(0x1F300, 0x1F6FF, 20_000))
    sources = "".join(p.read_text("utf-8") for folder in ("seqkv_edge", "native", "tests") for p in sorted((ROOT / folder).rglob("*")) if p.suffix in (".py", ".c", ".h", ".cpp"))
    noise = rng.bytes(300_000).decode("latin-1")
    everything = calibrate.default_text() + sources + emoji + noise
    with open_model(model.default_model(), ngl=0) as loaded:
        english = loaded.tokenize(calibrate.documentation(), add_special=False, parse_special=False)
        mixed = loaded.tokenize(everything, add_special=False, parse_special=False)
    assert len(everything.encode()) > 1_000_000
    assert tokens.decode(tokens.encode(mixed)) == mixed
    assert len(english) >= 4096
    assert 8 * len(tokens.encode(english[:4096])) / 4096 < 11


def test_token_coder_under_sanitizers(tmp_path):
    """A few seconds of tests/fuzz/tokens.c: faults, leaks, and ids that do not come back abort it."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover", f"-I{ROOT / 'native'}"]
    sources = [str(ROOT / "tests" / "fuzz" / "tokens.c"), str(ROOT / "native" / "tokens.c")]
    built = subprocess.run([compiler, *flags, *sources, "-o", str(tmp_path / "fuzz")], capture_output=True, text=True, check=False)
    if built.returncode and "sanitize" in built.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(tmp_path / "fuzz"), "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout.split()[0]) > 20, done.stderr
