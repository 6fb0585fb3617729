"""Live sessions: what a restored one continues with, prefixes, shifts, kills; on a tiny model, chats on the default model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import harness
import numpy as np
import pytest

from seqkv_edge import cli, coders, exchange, llama, manage, model, model_coder, state
from seqkv_edge.conversation import Conversation
from seqkv_edge.dropin import KvOptions
from seqkv_edge.engine import Context, Model, Sampling, open_model
from seqkv_edge.errors import SeqkvError, StateError, StoreError
from seqkv_edge.session import ChatSession, Session, fork, identify, read_end, read_frame
from seqkv_edge.state import FRAME
from seqkv_edge.store import Store

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = KvOptions(4, 64, None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("models")
    with open_model(harness.Models(folder).path("llama"), ngl=0) as loaded:
        yield loaded


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as opened:
        yield opened


def new(tiny: Model, kv: str = "seqkv3", options: KvOptions = OPTIONS, n_ctx: int = 1024, n_batch: int = 128) -> Context:
    kv_spec = llama.KvSpec.parse(kv)
    return tiny.context(kv_spec, n_ctx=n_ctx, n_batch=n_batch, options=options if kv_spec.ours else None, threads=1, force=True)


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 200, n).tolist()


def step(context: Context, tokens: list[int]) -> np.ndarray:
    """Logits after each of these tokens, evaluated one at a time."""
    rows = []
    for token in tokens:
        context.evaluate([token])
        rows.append(context.next_logits().copy())
    return np.stack(rows)


def saved(tiny: Model, store: Store, name: str, tokens: list[int], **settings) -> np.ndarray:
    """A stored session of these tokens; logits of what it would have continued with."""
    with new(tiny, **settings) as context:
        with Session(store, name, context) as session:
            context.evaluate(tokens)
            session.save(end=True)
        return step(context, text(80, 99))


@pytest.mark.parametrize("n", [1, 5, 63, 64, 65, 128, 200, 333])
@pytest.mark.parametrize("kv", ["seqkv3", "seqkv2:q8_0", "f16"])
def test_continues_bit_for_bit(tiny, store, kv, n):
    expected = saved(tiny, store, "a", text(n), kv=kv)
    with new(tiny, kv=kv) as context, Session(store, "a", context) as session:
        said: list[str] = []
        session.say = said.append
        assert session.load() is not None
        assert context.tokens == text(n) and said == []
        assert np.array_equal(step(context, text(80, 99)), expected)


def test_a_session_goes_on_over_several_runs(tiny, store):
    """Stop and go on after each of several pieces of text: as one run without stops, bit for bit."""
    tokens = text(420)
    with new(tiny) as whole:
        for at in range(0, 420, 70):
            whole.evaluate(tokens[at : at + 70])
        expected = step(whole, text(20, 5))
    for at in range(0, 420, 70):
        with new(tiny) as context, Session(store, "a", context) as session:
            session.load()
            assert context.n_past == at
            session.save(end=False)
            context.evaluate(tokens[at : at + 70])
    with new(tiny) as context, Session(store, "a", context) as session:
        session.load()
        assert np.array_equal(step(context, text(20, 5)), expected)
    assert len(store.nodes()) == 420 // FRAME  # no frame was written twice


def test_a_new_session_starts_from_the_longest_prefix(tiny, store):
    saved(tiny, store, "a", text(300))
    tokens = text(300) + text(50, 7)
    with new(tiny) as context, Session(store, "b", context) as session:
        session.save(end=False)
        evaluated: list[int] = []
        before = context.before
        context.before = lambda t: (evaluated.extend(t), before(t))
        assert session.find_prefix(tokens, 0) == 256
        assert context.tokens == tokens[:256]
        assert evaluated == tokens[192:256]  # the exact window again, no more
        context.evaluate(tokens[256:])
    # the window of the last frame was computed on what blocks, not exact rows, had been read from: nearly the same
    with new(tiny) as fresh:
        fresh.evaluate(tokens)
        want = fresh.next_logits().copy()
    with new(tiny) as context, Session(store, "b", context) as session:
        session.load()
        got = step(context, [5])
    with new(tiny) as fresh:
        fresh.evaluate(tokens)
        want = step(fresh, [5])
    assert np.abs(softmax(got) - softmax(want)).sum() < 0.2
    # nothing to gain: the cache is left alone
    with new(tiny) as context, Session(store, "c", context) as session:
        assert session.find_prefix(text(300, 8), 0) == 0
        assert session.find_prefix(tokens[:100], 0) == 0 and context.n_past == 0


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_sessions_with_a_shared_prefix_share_their_frames(tiny, store):
    prefix = text(512)
    for i in range(12):
        with new(tiny) as context, Session(store, f"s{i}", context) as session:
            session.save(end=False)
            tokens = prefix + text(70, 100 + i)
            n = session.find_prefix(tokens, 0)
            assert n == (0 if i == 0 else 512)
            context.evaluate(tokens[n:])
    sizes = [n.size for n in store.nodes()]
    assert len({n.size for n in store.nodes() if n.depth}) == 1
    # prefix, the frame that all others evaluate again, and one frame behind the prefix for each
    assert len(sizes) <= 8 + 1 + 12 and sum(n.depth < 8 for n in store.nodes()) <= 9
    bits, tokens, _ = store.distance("s3", "s7")
    assert tokens == 512 and bits >= 0


def test_what_was_evaluated_twice_is_kept_as_it_was(tiny, store):
    """Removing the end of the cache and going on otherwise: the frames from there are new, the others stay."""
    with new(tiny) as context, Session(store, "a", context) as session:
        session.save(end=False)
        context.evaluate(text(200))
        context.keep(100)
        context.evaluate(text(150, 3))
        session.save(end=True)
        session.flush()
        expected = step(context, text(30, 9))
        context.before = context.after = None
    # the steps were saved with the session's end: go on from the state before them
    assert store.session("a").n_tokens == 250 + 30
    assert store.tokens(store.session("a"))[:250] == text(200)[:100] + text(150, 3)
    with new(tiny) as context, Session(store, "a", context) as session:
        session.load()
        context.keep(250)
        assert context.n_past == 250
    assert expected.shape[0] == 30


def test_after_a_context_shift(tiny, store):
    """Shifted frames depend on tokens that are gone: every byte is restored, and they are never found as anyone's prefix."""
    tokens = text(400)
    with new(tiny) as context:
        with Session(store, "a", context) as session:
            session.save(end=False)
            context.evaluate(tokens)
            assert context.shift(10, 110)
            context.evaluate(text(64, 4))
        remaining = list(context.tokens)
        before = state.read_range(context.pointer, 0, len(remaining), exact=True)
        expected = step(context, text(40, 9))
    assert remaining == tokens[:10] + tokens[110:] + text(64, 4)
    info = store.session("a")
    assert [n.private for n in store.path_to(info.node)] == [True] * (len(remaining) // FRAME)
    assert store.longest_prefix(info.context, remaining) == []
    with new(tiny) as context, Session(store, "a", context) as session:
        session.load()
        assert context.tokens == remaining and context.moved_from == 10
        after = state.read_range(context.pointer, 0, len(remaining), exact=True)
        for a, b in zip((before.offsets, *before.k, *before.v), (after.offsets, *after.k, *after.v)):
            assert np.array_equal(a, b)
        order = np.argsort(before.exact.positions)
        assert np.array_equal(before.exact.positions[order], after.exact.positions)
        for a, b in zip(before.exact.rows, after.exact.rows):
            assert np.array_equal(a[order], b)
        # the same rows, but the shift left a hole between cells, so that sums ran in another order
        assert np.allclose(step(context, text(40, 9)), expected, atol=1e-4)
        assert context.moved_from == 10
        context.keep(5)
        assert context.moved_from is None  # what is evaluated from here on is ordinary again


def test_another_window_type_or_model_is_evaluated_again(tiny, store):
    saved(tiny, store, "a", text(200))
    for settings, word in (({"options": KvOptions(4, 32, None)}, "window"), ({"kv": "seqkv4"}, "KV type")):
        with new(tiny, **settings) as context:
            store.fork("a", "b")
            with Session(store, "b", context) as session:
                said: list[str] = []
                session.say = said.append
                session.load()
                assert context.tokens == text(200)
                assert len(said) == 1 and word in said[0] and "evaluated again" in said[0]
        with new(tiny, **settings) as again, Session(store, "b", again) as session:
            said = []
            session.say = said.append
            session.load()
            assert said == []  # now stored as this
        store.delete("b")
    assert store.session("a").n_tokens == 200


def test_another_model_is_said(tiny, store, tmp_path):
    saved(tiny, store, "a", text(200))
    with open_model(harness.Models(tmp_path).path("llama-d128"), ngl=0) as other, new(other) as context, Session(store, "a", context) as session:
        said: list[str] = []
        session.say = said.append
        assert session.load() is not None and context.n_past == 0  # the conversation is evaluated with the next question
        assert len(said) == 1 and "llama.gguf" in said[0]


def test_a_damaged_chunk_is_evaluated_again(tiny, store):
    expected = saved(tiny, store, "a", text(300))
    path = store.path_to(store.session("a").node)
    file = store._file(f"{path[2].id.hex()}.raw")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with new(tiny) as context, Session(store, "a", context) as session:
        said: list[str] = []
        session.say = said.append
        session.load()
        assert context.tokens == text(300)
        assert any("damaged" in line for line in said)
        got = step(context, text(80, 99))
    assert np.abs(softmax(got) - softmax(expected)).sum(-1).mean() < 0.2
    with new(tiny) as context, Session(store, "a", context) as session:
        said = []
        session.say = said.append
        session.load()
        assert said == []
    assert store.verify() == []


def test_models_whose_state_has_other_parts_are_refused(store, tmp_path):
    with open_model(harness.Models(tmp_path).path("gemma2"), ngl=0) as sliding, new(sliding) as context:
        with pytest.raises(StateError, match="full attention") as error:
            Session(store, "a", context)
        assert "\n" not in str(error.value)


def test_two_sessions_of_one_name(tiny, store):
    with new(tiny) as first, new(tiny) as second:
        with Session(store, "a", first):
            with pytest.raises(StoreError, match="in use"):
                Session(store, "a", second)
            assert second.before is None
        again = Session(store, "a", second)
        again.load()
        again.close()


def test_a_session_that_does_not_fit(tiny, store):
    saved(tiny, store, "a", text(600))
    with new(tiny, n_ctx=512) as context, Session(store, "a", context) as session:
        with pytest.raises(StoreError, match="--ctx 600"):
            session.load()
        with pytest.raises(StoreError, match="not loaded"):
            session.save(end=False)
        context.evaluate(text(100, 5))
    assert store.tokens(store.session("a")) == text(600)  # what was not loaded is not written over


def test_degraded_sessions_are_evaluated_again(tiny, store):
    saved(tiny, store, "a", text(500))
    full = store.bytes()
    removed = store.gc(full // 2)
    assert removed.chunks and removed.coded == 1 and store.bytes() <= full // 2
    info = store.session("a")
    assert info.coder == "adaptive" and 0 < len(store.path_to(info.node)) < 500 // FRAME
    assert manage.tier(info, store.path_to(info.node)) == "stored + tokens"
    store.gc(100_000)
    assert store.tokens(store.session("a")) == text(500)
    with new(tiny) as context, Session(store, "a", context) as session:
        session.load()
        assert context.tokens == text(500)
    assert store.session("a").coder is None and store.verify() == []


def test_a_session_in_use_is_never_degraded(tiny, store):
    saved(tiny, store, "old", text(300, 2))
    with new(tiny) as context, Session(store, "a", context) as session:
        session.save(end=False)
        context.evaluate(text(300))
        session.save(end=True)
        session.flush()
        store.gc(1)
        assert store.find("old") is None
        info = store.session("a")
        assert all(n.level == "raw" for n in store.path_to(info.node)) and info.tail_size


def test_kill_loses_at_most_the_frame_in_flight(tiny, tmp_path):
    """kill -9 at random points of a run that says which frames it has handed over."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1] + '/tests'); sys.path.insert(0, sys.argv[1])\n"
        "import test_session as t\nfrom seqkv_edge.session import Session\nfrom seqkv_edge.store import Store\n"
        "from seqkv_edge.engine import open_model\n"
        "with open_model(sys.argv[2], ngl=0) as m, Store(sys.argv[3]) as store, t.new(m) as c:\n"
        "    s = Session(store, 'a', c)\n    s.load()\n    s.save(end=False)\n"
        "    todo = t.text(900)[c.n_past:]\n    print('start', c.n_past, flush=True)\n"
        "    for token in todo:\n        c.evaluate([token]); print(c.n_past, flush=True)\n    s.close(); print('end', flush=True)\n"
    )
    rng = np.random.default_rng(5)
    lost: list[int] = []
    for round_ in range(6):
        path = tmp_path / "killed"
        process = subprocess.Popen(
            [sys.executable, str(script), str(ROOT), str(tiny.path), str(path)], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        assert process.stdout
        assert process.stdout.readline().startswith("start")
        time.sleep(float(rng.uniform(0.0, 0.4)))
        os.kill(process.pid, signal.SIGKILL)
        lines = process.stdout.read().split()
        process.wait()
        done = int(lines[-1]) if lines and lines[-1] != "end" else 900 if lines else None
        with Store(path) as store:
            assert store.verify() == []
            info = store.session("a")
            tokens = store.tokens(info)
            assert tokens == text(900)[: len(tokens)]
            if done is not None:
                lost.append(done - len(tokens))
        if len(tokens) == 900:
            break
    assert lost and max(lost) < 2 * FRAME  # the frame that was not complete, and the one being written
    with Store(tmp_path / "killed") as store, new(tiny) as context, Session(store, "a", context) as session:
        session.load()
        assert context.tokens == tokens
        assert store.gc(grace=0).files >= 0 and store.verify() == []


def test_export_and_import(tiny, store, tmp_path):
    expected = saved(tiny, store, "a", text(300))
    file = tmp_path / "a.session"
    exchange.export_session(store, "a", file)
    with Store(tmp_path / "other") as other:
        assert exchange.import_session(other, file) == "a"
        assert other.verify() == []
        with pytest.raises(StoreError, match="already"):
            exchange.import_session(other, file)
        with new(tiny) as context, Session(other, "a", context) as session:
            session.load()
            assert np.array_equal(step(context, text(80, 99)), expected)
            # what came from elsewhere is nobody's prefix
            assert other.longest_prefix(session.id, text(300)) == []
    # where the same frames are already, they are shared
    n = len(store.nodes())
    exchange.import_session(store, file, "again")
    assert len(store.nodes()) == n


def test_surprisal_is_that_of_the_logits(tiny, store):
    tokens = text(130)
    with new(tiny) as context, Session(store, "a", context) as session:
        session.save(end=False)
        want = 0.0
        for i, token in enumerate(tokens):
            if 64 < i < 128:
                want -= float(np.log2(softmax(context.next_logits().astype(np.float64))[token]))
            if i == 64:
                want -= float(np.log2(softmax(context.next_logits().astype(np.float64))[token]))
            context.evaluate([token])
        session.flush()
        node = store.path_to(store.session("a").node)[1]
    assert node.surprisal.n == 64
    assert node.surprisal.bits == pytest.approx(want, rel=1e-4)


def test_ranges_that_are_not_there(tiny):
    with new(tiny) as context:
        context.evaluate(text(100))
        for first, end in ((0, 101), (100, 101), (-1, 5), (5, 5), (7, 3), (0, 1 << 30)):
            with pytest.raises(StateError) as error:
                state.read_range(context.pointer, first, end, exact=True)
            assert "\n" not in str(error.value)
        assert state.read_range(context.pointer, 30, 40, exact=False).positions.tolist() == list(range(30, 40))
        context.shift(10, 20)  # rows are found by position, wherever their cells are
        piece = state.read_range(context.pointer, 5, 90, exact=False)
        assert piece.positions.tolist() == list(range(5, 90)) and piece.offsets.tolist() == [*range(5, 10), *(i % 64 for i in range(20, 100))]


def test_state_pieces_are_the_whole_state(tiny):
    with new(tiny) as context:
        context.evaluate(text(150))
        layout = identify(context).layout
        size = context.api.llama_state_seq_get_size(context.pointer, 0)
        whole = bytearray(size)
        import ctypes

        assert context.api.llama_state_seq_get_data(context.pointer, (ctypes.c_uint8 * size).from_buffer(whole), size, 0) == size
        chunks = [(read_frame(context, i, 4), FRAME) for i in range(2)]
        end = read_end(context, 4, 64)
        exact = state.check_chunk(end, layout, 22)
        assert len(exact.positions) == 68
        assert state.build(layout, [*chunks, (end, 22)], context.tokens, exact) == whole
        for cut in (0, 7, 8, 60, 100, len(whole) // 2, len(whole) - 1):
            with pytest.raises(state.StateError):
                state.parse(bytes(whole[:cut]))


# --- coding with the model's probabilities ---


def test_model_coder_gives_back_any_tokens(tiny):
    rng = np.random.default_rng(2)
    n_ctx, model_coder.N_CTX = model_coder.N_CTX, 256  # so that the context fills up
    try:
        for ids in ([], [5], text(40), rng.integers(0, tiny.n_vocab, 700).tolist()):
            coded = model_coder.encode(tiny, ids, threads=1)
            assert model_coder.decode(tiny, coded, threads=1) == ids
    finally:
        model_coder.N_CTX = n_ctx
    with pytest.raises(StoreError, match="cannot be coded"):
        model_coder.encode(tiny, [tiny.n_vocab])


def test_model_coder_comes_close_to_the_entropy(tiny):
    """Tokens drawn from the model itself: the bits of its probabilities, and a check byte after 64 tokens."""
    rng, ids, bits = np.random.default_rng(3), [], 0.0
    with tiny.context(llama.KvSpec.parse("f16"), n_ctx=1024, threads=1, force=True) as context:
        source = model_coder._distributions(context)
        table = next(source)
        for _ in range(512):
            token = int(np.searchsorted(table, rng.integers(table[-1]), "right")) - 1
            bits -= np.log2((table[token + 1] - table[token]) / table[-1])
            ids.append(token)
            table = source.send(token)
    size = 8 * (len(model_coder.encode(tiny, ids, threads=1)) - len(model_coder.encode(tiny, [], threads=1)))
    assert bits + 512 / 64 * 8 - 1 < size < bits + 512 / 64 * 8 + 16


@pytest.mark.slow
@pytest.mark.model
def test_model_coder_over_20000_tokens_of_everything(default_model):
    """Prose, code, emoji and noise, the context filled up many times over; English at the bits it is meant to have. Minutes."""
    from seqkv_edge import calibrate

    rng, parts = np.random.default_rng(4), []
    english = default_model.tokenize(calibrate.documentation()[20_000:], add_special=True, parse_special=False)[:8_000]
    for data in (
        Path(model_coder.__file__).read_text(encoding="utf-8") * 2,
        "".join(chr(0x1F300 + int(i)) for i in rng.integers(0, 700, 1200)),
        rng.bytes(3000).decode("latin-1"),
        Path(calibrate.__file__).with_name("languages.txt").read_text(encoding="utf-8"),
    ):
        parts += default_model.tokenize(data, add_special=False, parse_special=False)
    ids = english + (parts * 3)[: 20_000 - len(english)]
    assert len(ids) == 20_000
    marks: list[int] = []
    coded = model_coder.encode(default_model, english[:4096], lambda n: marks.append(n))
    assert sum(marks) == 2 * 4096 and 8 * len(coded) / 4096 <= 5.0
    assert len(model_coder.encode(default_model, ids)) < 4 * 20_000  # decoded and compared before it is returned


def test_other_probabilities_are_noticed(tiny, monkeypatch):
    """A backend that computes a little differently decodes something else, and that is said."""
    ids = text(300)
    coded = model_coder.encode(tiny, ids, threads=1)
    exact = model_coder.frequencies
    monkeypatch.setattr(model_coder, "frequencies", lambda logits: exact(logits * np.float32(1 + 2e-6)))
    with pytest.raises(StoreError, match="another backend"):
        model_coder.decode(tiny, coded, threads=1)
    # what does not survive is never returned
    calls = iter(range(10**6))
    monkeypatch.setattr(model_coder, "frequencies", lambda logits: exact(logits * np.float32(1 + 1e-6 * (next(calls) > 400))))
    with pytest.raises(StoreError):
        model_coder.encode(tiny, ids, threads=1)


def test_damaged_model_codes(tiny):
    ids = text(130)
    coded = model_coder.encode(tiny, ids, threads=1)
    rng = np.random.default_rng(4)
    for n in (0, 1, 5, 20, 40, len(coded) - 3):
        with pytest.raises(StoreError):
            model_coder.decode(tiny, coded[:n], threads=1)
    for _ in range(12):
        bad = bytearray(coded)
        bad[rng.integers(len(bad) - 2)] ^= 1 << rng.integers(8)
        try:
            assert model_coder.decode(tiny, bytes(bad), threads=1) == ids
        except SeqkvError as error:
            assert "\n" not in str(error)


def test_a_packed_session(tiny, store, capsys):
    saved(tiny, store, "a", text(200))
    saved(tiny, store, "b", text(200) + text(5, 3))
    size = store.bytes()
    where = ["--store", str(store.path), "--model", str(tiny.path)]
    assert cli.main(["session", "pack", "b", *where, "--threads", "1"]) == 0
    assert cli.main(["session", "pack", "a", *where, "--adaptive"]) == 0
    assert "bits each" in capsys.readouterr().out
    assert store.bytes() < size and store.nodes() == [] and not list(store.chunks.glob("*/*"))
    assert store.session("b").coder == "model"
    with pytest.raises(StoreError, match="open it with that model"):
        store.tokens(store.session("b"))
    for name, ids in (("a", text(200)), ("b", text(200) + text(5, 3))):
        with new(tiny) as context, Session(store, name, context) as session:
            session.load()
            assert context.tokens == ids
        assert store.session(name).coder is None


# --- chats, with the default model ---


def chat(*args: str, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "seqkv_edge", "chat", "--temp", "0", "--ctx", "1024", "--threads", "1", *args]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL, **settings)


@pytest.fixture(scope="module")
def default() -> Iterator[Model]:
    with open_model(model.default_model(), ngl=0) as opened:
        yield opened


@pytest.mark.model
def test_a_chat_goes_on_in_another_process(default, tmp_path, capsys):
    questions = ("Tell me about the sea, in detail.", "And about ships?", "Which is larger?")
    with default.context(llama.KvSpec.parse("seqkv3"), n_ctx=1024, threads=1, options=KvOptions()) as context:
        talk = Conversation(context)
        expected = ["".join(talk.ask(q, Sampling(temp=0), n_predict=40)).strip() for q in questions]
    path = str(tmp_path / "s")
    for question, answer in zip(questions, expected):
        done = chat("--session", "sea", "--store", path, "-n", "40", "--prompt", question)
        assert done.returncode == 0 and done.stderr == "" and done.stdout.strip() == answer
    assert cli.main(["session", "list", "--json", "--store", path]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["sessions"]
    assert listed["name"] == "sea" and listed["turns"] == 3 and listed["tier"] == "stored" and listed["bits_per_token"] > 0
    # a fork after the first answer goes on as the chat did
    assert cli.main(["session", "fork", "sea", "other", "--turn", "1", "--store", path]) == 0
    done = chat("--session", "other", "--store", path, "-n", "40", "--prompt", questions[1])
    assert done.returncode == 0 and len(done.stdout) > 20
    assert cli.main(["session", "show", "--store", path, "--why"]) == 0
    assert "tokens" in capsys.readouterr().out
    assert cli.main(["session", "verify", "--store", path]) == 0


@pytest.mark.model
def test_an_answer_cut_by_a_kill_is_kept(default, tmp_path):
    path = tmp_path / "s"
    command = [sys.executable, "-m", "seqkv_edge", "chat", "--temp", "0", "--ctx", "1024", "--threads", "1", "--session", "a"]
    command += ["--store", str(path), "-n", "400", "--prompt", "Write a long story about a ship on the sea."]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert process.stdout
    shown = b""
    while len(shown) < 600 and (piece := process.stdout.read1(4096)):
        shown += piece
    os.kill(process.pid, signal.SIGKILL)
    shown += process.stdout.read()
    process.wait()
    with Store(path) as store, default.context(llama.KvSpec.parse("seqkv3"), n_ctx=1024, threads=1, options=KvOptions()) as context:
        talk = Conversation(context)
        with Session(store, "a", context) as session:
            ChatSession(session, talk).open()
            assert [m["role"] for m in talk.messages[-2:]] == ["user", "assistant"]
            kept = talk.messages[-1]["content"]
            assert shown.decode().startswith(kept) or kept.startswith(shown.decode().rstrip("\n"))
            assert len(default.tokenize(shown.decode()[len(kept) :], add_special=False, parse_special=False)) < 2 * FRAME
            assert "".join(talk.ask("Go on.", Sampling(temp=0), n_predict=5))
    with Store(path) as store:
        copy = fork(store, "a", "b", -1)
        assert copy.n_tokens == store.session("a").n_tokens


# --- llama-cpp-python's cache ---


@pytest.mark.model
def test_llama_cpp_python_cache(tmp_path):
    from llama_cpp import Llama

    import seqkv_edge
    from seqkv_edge.llama_cache import StoreCache

    def load() -> Llama:
        kv = seqkv_edge.kv("seqkv3")
        return Llama(str(model.default_model()), n_ctx=1024, n_batch=256, n_threads=1, verbose=False, **kv)

    long = "The sea is large. " * 60
    asked: list[int] = []

    def complete(llm: Llama, prompt: str) -> str:
        before = llm.eval
        asked.clear()
        llm.eval = lambda t: (asked.extend(t), before(t))
        try:
            return llm(prompt, max_tokens=12, temperature=0)["choices"][0]["text"]
        finally:
            del llm.eval

    llm = load()
    llm.set_cache(StoreCache(llm, tmp_path / "s"))
    level = llm.cache.level
    assert level.startswith("small-")
    first = complete(llm, long + "Ships")
    n_prompt = len(llm.tokenize((long + "Ships").encode()))
    assert len(asked) >= n_prompt
    put, coded = llm.cache.store.put, []
    llm.cache.store.put = lambda *args, **settings: coded.append(args) or put(*args, **settings)
    again = complete(llm, long + "Ships" + first + " and")
    assert len(asked) < 40 and len(coded) <= 2  # what is there is not coded again
    llm.close()
    with Store(tmp_path / "s") as store:
        assert store.verify() == [] and len(store.sessions()) == 1  # the longer state holds the shorter
        assert {node.level for node in store.nodes()} == {level}

    # another process would find the same
    llm = load()
    cache = StoreCache(llm, tmp_path / "s")
    llm.set_cache(cache)
    tokens = llm.tokenize((long + "Other").encode())
    assert tokens in cache and [5, 6, 7] not in cache
    assert complete(llm, long + "Other")
    assert len(asked) < 12 + 64 + 64 + 10
    assert complete(llm, long + "Ships" + first + " and") == again
    llm.close()
    with pytest.raises(KeyError):
        cache[[5, 6, 7]]


def test_server_arguments(monkeypatch, capsys):
    """--kv becomes the numbers that the server takes, the disk cache is on; without the server's own packages one line says what to do."""
    from seqkv_edge import server

    where, rest = server.arguments(["--model", "x.gguf", "--store", "s", "--kv", "seqkv4:q8_0"])
    given = dict(zip(rest[::2], rest[1::2]))
    assert where == "s" and given["--type_k"] == str(llama.type_id("seqkv4")) and given["--type_v"] == str(llama.type_id("q8_0"))
    assert (given["--cache"], given["--cache_type"], given["--flash_attn"], given["--model"]) == ("true", "disk", "true", "x.gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp.server.__main__", None)
    monkeypatch.setattr(sys, "argv", ["server"])
    with pytest.raises(SystemExit) as error:
        server.main()
    said = capsys.readouterr().err
    assert error.value.code == 2 and "pip install 'llama-cpp-python[server]'" in said and said.count("\n") == 1


@pytest.mark.model
def test_llama_cpp_python_server(tmp_path):
    """The server as it is: what it answered is in the store, and another process starts from it."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    import socket
    import urllib.error
    import urllib.request

    prompt = "The sea is large. " * 60

    def ask(text: str) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "seqkv_edge.server", "--model", str(model.default_model()), "--store", str(tmp_path / "s"),
                   "--port", str(port), "--n_ctx", "1024", "--n_threads", "1", "--verbose", "false"]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        body = json.dumps({"prompt": text, "max_tokens": 4, "temperature": 0}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
        try:
            for _ in range(600):
                assert process.poll() is None, process.stderr and process.stderr.read()
                try:
                    with urllib.request.urlopen(request, timeout=300) as reply:
                        return json.load(reply)["choices"][0]["text"]
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.1)
            pytest.fail("the server does not answer")
        finally:
            process.terminate()
            process.communicate(timeout=60)

    first = ask(prompt + "Ships")
    with Store(tmp_path / "s") as store:
        frames = store.nodes()
        assert len(frames) > 3 and {node.level for node in frames} == {frames[0].level} != {"raw"}
        assert all(node.hits == 0 for node in frames)
    assert ask(prompt + "Ships") == first
    with Store(tmp_path / "s") as store:
        assert store.nodes()[0].hits == 1 and store.verify() == []


# --- frames that are coded from the frames before them ---


@pytest.fixture(scope="module")
def default_model() -> Iterator[Model]:
    """The default model, whose profile has predictors."""
    with open_model(model.resolve(None), ngl=0) as loaded:
        yield loaded


SPEECH = "The store keeps what every session shares. A frame has sixty-four tokens, and what follows it is predicted from it. "


def coded(default_model: Model, n_ctx: int = 1024) -> Context:
    return default_model.context(llama.KvSpec.parse("seqkv3"), n_ctx=n_ctx)


def words(default_model: Model, n: int) -> list[int]:
    return default_model.tokenize(SPEECH * 30, add_special=True, parse_special=False)[:n]


@pytest.mark.model
@pytest.mark.parametrize("n_tokens", [320, 340])
def test_coded_frames_continue_bit_for_bit(default_model, store, n_tokens):
    """Coded smaller than the blocks are, in two runs and by two coders, and read back as they were."""
    tokens = words(default_model, n_tokens)
    with coded(default_model) as context:
        with Session(store, "a", context) as session:
            assert session.level.startswith("small-")
            context.evaluate(tokens[:200])
        with Session(store, "a", context) as session:  # a coder that has seen nothing yet
            session.load()
            context.evaluate(tokens[200:])
            session.save(end=True)
        expected = step(context, tokens[:40])
        row_bytes = identify(context).layout.row_bytes
    nodes = store.path_to(store.session("a").node)
    assert len(nodes) == 5 and all(n.level == session.level for n in nodes)
    assert sum(n.size for n in nodes[1:]) < 0.85 * 4 * FRAME * row_bytes  # the first has exact rows too
    with Store(store.path) as other, coded(default_model) as context, Session(other, "a", context) as session:
        said: list[str] = []
        session.say = said.append
        session.load()
        assert np.array_equal(step(context, tokens[:40]), expected) and said == []
        assert other.verify() == []


@pytest.mark.model
def test_damage_of_a_coded_frame_stops_there(default_model, store):
    """A flipped bit: what is before it is used, it and what is behind it are evaluated again and coded anew."""
    tokens = words(default_model, 330)
    with coded(default_model) as context, Session(store, "a", context):
        context.evaluate(tokens)
    nodes = store.path_to(store.session("a").node)
    file = next(store.chunks.glob(f"*/{nodes[2].id.hex()}.*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    for said in (["the chunk of tokens 128 to 191 is damaged"], []):
        with Store(store.path) as other, coded(default_model) as context, Session(other, "a", context) as session:
            heard: list[str] = []
            session.say = heard.append
            session.load()
            assert context.tokens == tokens
            assert len(heard) == len(said) and all(h.startswith(s) for h, s in zip(heard, said))
    assert Store(store.path).verify() == []


@pytest.mark.model
def test_a_damaged_copy_of_the_predictors(default_model, store):
    """Without them frames cannot be read, and that is said; a session of the same profile brings them back."""
    tokens = words(default_model, 200)
    with coded(default_model) as context, Session(store, "a", context):
        context.evaluate(tokens)
    for file in (store.path / "profiles").glob("*.gguf"):
        file.write_bytes(file.read_bytes()[:1000])
    with Store(store.path) as other:
        problems = other.verify()
        assert len(problems) == 1 and "predictors are missing or damaged" in problems[0].what
    with Store(store.path) as other, coded(default_model) as context, Session(other, "a", context) as session:
        heard: list[str] = []
        session.say = heard.append
        session.load()
        assert context.tokens == tokens and heard == [] and other.verify() == []


@pytest.mark.model
def test_branches_of_coded_frames(default_model, store):
    """Two sessions that share frames and go on differently, saved in turns: each is read back as it was."""
    shared, ends = words(default_model, 200), {"a": words(default_model, 400)[:200:-1], "b": words(default_model, 199)[::-1]}
    rows = {}
    for name, end in ends.items():
        with coded(default_model) as context, Session(store, name, context) as session:
            session.save(end=False)
            context.evaluate((shared + end)[session.find_prefix(shared + end, 0) :])
            session.save(end=True)
            session.flush()
            rows[name] = [read_frame(context, i, session.n_sink).blocks for i in range(context.n_past // FRAME)]
    paths = {name: store.path_to(store.session(name).node) for name in ends}
    same = [x.id == y.id for x, y in zip(paths["a"], paths["b"])]
    assert same[:2] == [True] * 2 and not any(same[3:])  # the last shared frame is evaluated again, and may differ in a rounding
    for name in ends:
        chunks, damaged = store.restore(paths[name])
        assert damaged is None and [c.blocks for c in chunks] == rows[name]


@pytest.mark.model
def test_a_shared_prefix_is_decoded_once(default_model, store, monkeypatch):
    """Neither the frame that is evaluated again, nor the path once more to code what follows it."""
    tokens, decoded = words(default_model, 400), []
    run = coders.Delta.decode_run
    monkeypatch.setattr(coders.Delta, "decode_run", lambda self, frames, threads=2: decoded.extend(frames) or run(self, frames, threads))
    for name in ("a", "b", "c"):
        decoded.clear()
        with coded(default_model) as context, Session(store, name, context) as session:
            session.save(end=False)
            context.evaluate(tokens[session.find_prefix(tokens, 0) :])
        assert [frame[0] for frame in decoded] == [tuple(tokens[FRAME * i : FRAME * (i + 1)]) for i in range(0 if name == "a" else 5)]


@pytest.mark.model
def test_a_session_stored_with_loss(default_model, store, capsys):
    """Fewer bytes, and said: never shared with others, and those that others share stay exact. It goes on from what is stored."""
    tokens = words(default_model, 450)
    for name in ("a", "b"):
        with coded(default_model) as context, Session(store, name, context) as session:
            session.save(end=False)
            todo = tokens if name == "a" else tokens[:200] + tokens[:199:-1]
            context.evaluate(todo[session.find_prefix(todo, 0) :])
            session.save(end=True)
    exact = {name: store.path_to(store.session(name).node) for name in "ab"}
    n_shared = sum(x.id == y.id for x, y in zip(exact["a"], exact["b"]))
    assert 2 <= n_shared <= 3
    assert cli.main(["session", "pack", "a", "--lossy", "0.02", "--store", str(store.path)]) == 0
    said = capsys.readouterr().out
    found = re.search(r"'a': (\d+) frames, keys in \d and values in \d bits a value fewer: ([0-9,]+) -> ([0-9,]+) bytes; KLD ([0-9.]+) from", said)
    assert found, said
    n, before, after, kld = (float(found[i].replace(",", "")) for i in (1, 2, 3, 4))
    lossy = store.path_to(store.session("a").node)
    assert n == len(lossy) - n_shared and after < 0.95 * before and 0 < kld <= 0.02
    assert [x.id for x in lossy[:n_shared]] == [x.id for x in exact["a"][:n_shared]]
    assert [x.id for x in store.path_to(store.session("b").node)] == [x.id for x in exact["b"]]
    assert all(x.level.startswith("lossy") and x.private for x in lossy[n_shared:]) and store.verify() == []
    assert not {x.id for x in store.nodes()} & {x.id for x in exact["a"][n_shared:]}  # the exact ones are gone
    assert cli.main(["session", "show", "a", "--store", str(store.path)]) == 0 and "(with loss)" in capsys.readouterr().out
    assert cli.main(["session", "list", "--json", "--store", str(store.path)]) == 0
    assert {d["name"]: d["tier"] for d in json.loads(capsys.readouterr().out)["sessions"]} == {"a": "stored, lossy", "b": "stored"}
    with coded(default_model) as context, Session(store, "a", context) as session:
        heard: list[str] = []
        session.say = heard.append
        session.load()
        assert context.tokens == tokens and len(heard) == 1 and "not bit for bit" in heard[0]
        rows = [read_frame(context, i, session.n_sink).blocks for i in range(len(lossy))]
    chunks, damaged = store.restore(lossy)
    assert damaged is None and [c.blocks for c in chunks] == rows
    exchange.export_session(store, "a", store.path / "a.session")  # a copy says it too
    exchange.import_session(store, store.path / "a.session", "d")
    assert manage.tier(store.session("d"), store.path_to(store.session("d").node)) == "stored, lossy" and store.verify() == []
    with coded(default_model) as context, Session(store, "c", context) as session:  # a new one starts from what is exact
        found = store.longest_prefix(session.id, tokens)
        assert len(found) >= n_shared and not any(x.private or x.level.startswith("lossy") for x in found)
    assert cli.main(["session", "pack", "a", "--lossy", "0.02", "--store", str(store.path)]) == 0
    assert "nothing was done" in capsys.readouterr().out
    assert cli.main(["session", "pack", "b", "--lossy", "1e-9", "--store", str(store.path)]) == 1
    assert "allow more, or leave it exact" in capsys.readouterr().err
