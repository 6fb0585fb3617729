"""Calibration: what limits a profile is said, failures are one line, and nothing half-written stays."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import harness as h
import numpy as np
import pytest
import tiny
from gguf import GGUFReader

pytestmark = pytest.mark.skipif(not h.PATCHED, reason="needs the patched libraries")

if h.PATCHED:
    from seqkv_edge import calibrate, cli, delta, design, llama, profile
    from seqkv_edge.capture import Rows
    from seqkv_edge.design import add
    from seqkv_edge.dropin import KvOptions
    from seqkv_edge.engine import Model, open_model
    from seqkv_edge.errors import ModelError, UsageError
    from seqkv_edge.gguf_meta import fingerprint, read_header

TEXT = " ".join(f"{i} times {i + 1} is {i * (i + 1)};" for i in range(400))  # about 8,000 tokens of the tiny models


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("model") / "llama.gguf", tiny.SPECS["llama"], "llama")


@pytest.fixture
def loaded(tiny_path: Path) -> Iterator[Model]:
    with open_model(tiny_path, ngl=0) as model:
        yield model


@pytest.fixture(autouse=True)
def _interrupts_are_on() -> Iterator[None]:
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def measure(loaded: Model, **changes: object) -> profile.Measured:
    assert loaded.pointer
    return calibrate.measure(loaded.pointer, loaded.path, **{"text": TEXT, "n_tokens": 1200, "quality": False} | changes)


def told(record: list[warnings.WarningMessage]) -> str:
    """The one warning, of one line."""
    assert len(record) == 1 and "\n" not in str(record[0].message)
    return str(record[0].message)


# -- what is measured


def test_profile_of_a_tiny_model(loaded: Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = measure(loaded, quality=True)
    assert [layer.layer for layer in made.layers] == [0, 1] and made.n_tokens == 1200
    assert all(layer.k_damage > 0 and layer.v_damage > 0 for layer in made.layers)
    assert made.quality.keys() == set(llama.OUR_TYPES)
    assert 0 < made.quality["seqkv4"] < made.quality["seqkv3"] < made.quality["seqkv2"] < 1


def test_quality_leaves_no_profile_configured(loaded: Model, tmp_path: Path) -> None:
    """A context made afterwards, by whoever does not configure the model, has types of their own size and no tables."""
    kept = list(tmp_path.iterdir())
    measure(loaded, quality=True)
    params = loaded.api.llama_context_default_params()
    params.n_ctx, params.type_k, params.type_v = 256, llama.type_id("seqkv3"), llama.type_id("seqkv3")
    init = loaded.api.llama_init_from_model
    ctx = getattr(init, "__wrapped__", init)(loaded.pointer, params)
    try:
        assert llama.bits(ctx) == llama.type_bits("seqkv3")
        assert llama.library().handle.llama_seqkv_profile_bytes(ctx) == 0
    finally:
        loaded.api.llama_free(ctx)
    assert list(tmp_path.iterdir()) == kept


def test_weights_are_read_once(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import quants

    own, calls = quants.dequantize, []

    def dequantize(data: np.ndarray, qtype: object) -> np.ndarray:
        calls.append(qtype)
        return own(data, qtype)

    monkeypatch.setattr(quants, "dequantize", dequantize)
    measure(loaded, n_tokens=2100)  # three windows
    assert len(calls) == 2


def test_output_metric_is_that_of_the_weights(loaded: Model) -> None:
    import gguf

    spec = tiny.SPECS["llama"]
    weight = next(t for t in gguf.GGUFReader(loaded.path).tensors if t.name == "blk.1.attn_output.weight").data  # (n_embd, heads*dv)
    got = calibrate._OutputMetrics(loaded.path)._gram(1, spec.n_head, spec.head_dim)
    assert got is not None and got.shape == (spec.n_head, spec.head_dim, spec.head_dim)
    for i in range(spec.n_head):
        part = weight[:, i * spec.head_dim : (i + 1) * spec.head_dim]
        assert np.allclose(got[i], part.T @ part, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_tokens", [1025, 1024 + 68])
def test_a_rest_too_short_to_be_coded_is_left_out(loaded: Model, n_tokens: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = measure(loaded, n_tokens=n_tokens)
    assert made.n_tokens == 1024
    for a, b in zip(made.layers, measure(loaded, n_tokens=1024).layers):
        assert np.array_equal(a.k_encode, b.k_encode) and np.array_equal(a.k_mean, b.k_mean)


# -- what limits it is said


def test_unreadable_output_weights_are_told(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import quants

    def dequantize(_data: np.ndarray, _qtype: object) -> np.ndarray:
        raise NotImplementedError

    monkeypatch.setattr(quants, "dequantize", dequantize)
    with pytest.warns(RuntimeWarning) as record:
        made = measure(loaded, n_tokens=2100)
    assert "(layers 0-1) have no matrix that can be read" in told(list(record))
    assert len(made.layers) == 2


def test_missing_residual_norms_are_told(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setattr(calibrate, "add", lambda stats, rows, *args, **kw: design.add(stats, replace(rows, x2=None), *args, **kw))
    with pytest.warns(RuntimeWarning) as record:
        made = measure(loaded)
    assert "(layers 0-1) were not found: every layer gets the same bits" in told(list(record))
    assert design.plan_bits(made.layers, 3) == ({0: 3, 1: 3}, {0: 3, 1: 3})


@pytest.mark.parametrize(("n_text", "n_made"), [(1300, 1200), (700, 700)])
def test_a_short_text_is_told(loaded: Model, n_text: int, n_made: int) -> None:
    text = TEXT[: n_text - 1]  # a token is a byte, and BOS
    with pytest.warns(RuntimeWarning) as record:
        made = measure(loaded, text=text, quality=True)
    assert f"the text has {n_text} tokens" in told(list(record)) and "its quality was not measured" in told(list(record))
    assert made.n_tokens == n_made and made.quality == {}


def test_too_short_texts_and_numbers_are_refused(loaded: Model) -> None:
    with pytest.raises(ModelError, match="the text gives 101 tokens, a profile needs at least 256"):
        measure(loaded, text=TEXT[:100])
    for n in (255, 0, -1):
        with pytest.raises(UsageError, match="at least 256"):
            measure(loaded, n_tokens=n)


def test_built_in_text_is_of_several_kinds() -> None:
    text = calibrate.default_text()
    assert text == calibrate.default_text()
    start = text[:14_000]  # of a profile of 4,096 tokens
    at = [start.index(part) for part in ("Die Werkstatt", "Le marché", "春天", "def merge(", "def get(self")]
    assert at == sorted(at) and calibrate.documentation().startswith(start[: at[0]].rstrip())
    assert 6_000 < at[0] < 10_000 and text.endswith(calibrate.documentation()[-100_000:])


def test_missing_sources_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    def getsource(_function: object) -> str:
        raise OSError

    monkeypatch.setattr(inspect, "getsource", getsource)
    with pytest.warns(RuntimeWarning, match="without a sample of code"):
        text = calibrate.default_text()
    assert "Die Werkstatt" in text and "def merge(" not in text


def test_ranges() -> None:
    assert calibrate._ranges([7, 0, 2, 1]) == "0-2, 7" and calibrate._ranges([3]) == "3"


# -- the command


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    status = cli.main(["calibrate", "--ngl", "0", "--tokens", "1200", *map(str, args)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_command(capsys: pytest.CaptureFixture[str], tiny_path: Path, text_file: Path, tmp_path: Path) -> None:
    """The estimate comes first; the same input gives the same file."""
    made = []
    for name in ("a.gguf", "b.gguf"):
        status, out, err = run(capsys, "--model", tiny_path, "--text", text_file, "-o", tmp_path / name)
        assert status == 0 and err.startswith("calibration on 1200 tokens: about ") and "mean KLD against f16" in out
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]
    info = profile.check(tmp_path / "a.gguf", fingerprint(tiny_path))
    assert info.n_tokens == 1200 and info.quality.keys() == set(llama.OUR_TYPES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "text.txt"]
    with open_model(tiny_path, ngl=0) as loaded:  # it is used
        with loaded.context(llama.KvSpec("seqkv3", "seqkv3"), n_ctx=256, options=KvOptions(profile=str(tmp_path / "a.gguf"))) as context:
            assert context.pointer and llama.library().handle.llama_seqkv_profile_bytes(context.pointer) > 0


def test_predictors_are_added(capsys: pytest.CaptureFixture[str], tiny_path: Path, text_file: Path, tmp_path: Path) -> None:
    """With a new profile or to one that is there; the live cache's part stays as it was, and the cache takes the file."""
    ours = ("--model", tiny_path, "--text", text_file, "-o", tmp_path / "a.gguf")
    assert run(capsys, *ours)[0] == 0
    plain = (tmp_path / "a.gguf").read_bytes()
    before = {t.name: np.array(t.data) for t in GGUFReader(tmp_path / "a.gguf").tensors}
    assert delta.read(tmp_path / "a.gguf", "seqkv3") is None
    status, out, err = run(capsys, *ours, "--predictors")
    assert (status, err) == (0, "") and "predictors from " in out
    after = {t.name: np.array(t.data) for t in GGUFReader(tmp_path / "a.gguf").tensors}
    assert all(np.array_equal(after[name], data) for name, data in before.items())
    for kv in llama.OUR_TYPES:
        coder = delta.read(tmp_path / "a.gguf", kv)
        assert coder is not None and coder.layers
    status, out, _ = run(capsys, *ours[:-1], tmp_path / "b.gguf", "--predictors")
    assert status == 0 and (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes() != plain
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "text.txt"]
    with open_model(tiny_path, ngl=0) as loaded:
        with loaded.context(llama.KvSpec("seqkv3", "seqkv3"), n_ctx=256, options=KvOptions(profile=str(tmp_path / "a.gguf"))) as context:
            assert context.pointer and llama.library().handle.llama_seqkv_profile_bytes(context.pointer) > 0


def refusals(folder: Path, model: Path, text: Path) -> dict[str, tuple[int, list[object], str]]:
    """By name: exit status, arguments, part of the line."""
    short, damaged = folder / "short.txt", folder / "no.gguf"
    short.write_text("a few words")
    damaged.write_text("this is no model")
    other = tiny.write(folder / "mamba.gguf", tiny.SPECS["mamba"], "mamba")
    ours = ["--model", model, "--text", text, "-o"]
    return {
        "model": (1, ["--model", folder / "none.gguf", "-o", folder / "p"], "none.gguf"),
        "not a GGUF file": (1, ["--model", damaged, "-o", folder / "p"], "no.gguf is not a GGUF file"),
        "architecture": (1, ["--model", other, "-o", folder / "p"], "cannot serve this model (mamba)"),
        "text": (2, ["--model", model, "--text", folder / "none.txt", "-o", folder / "p"], "cannot read --text"),
        "short text": (1, ["--model", model, "--text", short, "-o", folder / "p"], "use a longer text"),
        "tokens": (2, ["--tokens", 100, *ours, folder / "p"], "at least 256 tokens, not 100"),
        "directory": (1, [*ours, folder], "it is a directory; choose another place with -o"),
        "no directory": (1, [*ours, folder / "none" / "p"], "choose another place with -o"),
        "file as directory": (1, [*ours, text / "p"], "choose another place with -o"),
    }


def test_refusals(capsys: pytest.CaptureFixture[str], tiny_path: Path, text_file: Path, tmp_path: Path) -> None:
    cases = refusals(tmp_path, tiny_path, text_file)
    before = sorted(tmp_path.iterdir())
    for name, (expected, args, part) in cases.items():
        status, out, err = run(capsys, *args)
        lines = [line for line in err.splitlines() if not line.startswith("calibration on ")]
        assert (status, out, len(lines)) == (expected, "", 1), (name, err)
        assert lines[0].startswith("error: ") and part in lines[0], name
        assert sorted(tmp_path.iterdir()) == before, name


def test_a_place_that_cannot_be_written_is_known_before_the_run(
    capsys: pytest.CaptureFixture[str], tiny_path: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimate(*_: object) -> float:
        raise AssertionError("it ran")

    monkeypatch.setattr(calibrate, "estimate", estimate)
    status, _, err = run(capsys, "--model", tiny_path, "--text", text_file, "-o", "/dev/null/p.gguf")
    assert status == 1 and "choose another place with -o" in err and err.count("\n") == 1


@pytest.mark.parametrize("nth", [1, 3, 4])
def test_interrupt(
    capsys: pytest.CaptureFixture[str], tiny_path: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """ctrl-C in the middle, and in the last layer of all: what was there stays, nothing is added."""
    calls = []

    def add(*args: object, **kw: object) -> None:
        design.add(*args, **kw)  # type: ignore[arg-type]
        if len(args[1].q) > 1000 or calls:  # not in the estimate's trials  # type: ignore[attr-defined]
            calls.append(1)
        if len(calls) == nth:
            signal.raise_signal(signal.SIGINT)

    target = tmp_path / "p.gguf"
    target.write_bytes(b"the old one")
    monkeypatch.setattr(calibrate, "add", add)
    monkeypatch.setattr(calibrate, "estimate", lambda *_: 1.0)
    status, out, _ = run(capsys, "--model", tiny_path, "--text", text_file, "-o", target)
    assert status == 130 and out == "" and len(calls) == nth
    assert target.read_bytes() == b"the old one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.gguf", "text.txt"]


LIMITED = """
import resource, signal, sys
from seqkv_edge import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
@pytest.mark.parametrize(
    ("n_text", "where"), [(700, "{target}: No space left on device; choose another place with -o"), (900, "in {temp}: ")]
)
def test_full_disk(tiny_path: Path, tmp_path: Path, n_text: int, where: str) -> None:
    """Of the profile, or before that of the temporary file that its quality is measured with, where the text is long enough."""
    text, target = tmp_path / "text.txt", tmp_path / "p.gguf"
    text.write_text(TEXT[:n_text])
    target.write_bytes(b"the old one")
    command = ["calibrate", "--ngl", "0", "--tokens", "300", "--model", tiny_path, "--text", text, "-o", target]
    done = subprocess.run([sys.executable, "-c", LIMITED, *map(str, command)], capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if not line.startswith(("calibration on ", "warning: "))]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert errors[0].startswith("error: cannot write " + where.format(target=target, temp=tempfile.gettempdir()))
    assert target.read_bytes() == b"the old one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.gguf", "text.txt"]


def test_a_model_without_a_possible_profile_leaves_none(loaded: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that hardly vary: said so, with what to do, and no file that every later run would stumble over."""

    def still(stats: object, rows: Rows, *rest: object, **named: object) -> None:
        add(stats, replace(rows, k=np.float32(1000) + np.float32(1e-3) * rows.k, freq=np.zeros_like(rows.freq)), *rest, **named)

    monkeypatch.setattr(calibrate, "add", still)
    monkeypatch.setattr(profile, "cache_dir", lambda: tmp_path / "profiles")
    type_k = llama.type_id("seqkv3")
    assert loaded.pointer
    with pytest.raises(ModelError, match="vary too little .* use --no-profile") as error:
        profile.prepare(loaded.pointer, loaded.path, type_k, type_k, KvOptions())
    assert "\n" not in str(error.value) and not list(tmp_path.glob("profiles/*"))


def test_profile_of_another_model(capsys: pytest.CaptureFixture[str], tiny_path: Path, tmp_path: Path) -> None:
    other = tiny.write(tmp_path / "other.gguf", tiny.SPECS["llama-other"], "other")
    with open_model(other, ngl=0) as loaded:
        profile.write(tmp_path / "other.seqkv.gguf", other, fingerprint(other), measure(loaded, n_tokens=300))
    status = cli.main(["chat", "--ngl", "0", "--model", str(tiny_path), "--profile", str(tmp_path / "other.seqkv.gguf"), "--prompt", "x"])
    out, err = capsys.readouterr()
    assert status == 1 and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and "belongs to another model (other" in err
    assert read_header(tmp_path / "other.seqkv.gguf").fields["seqkv.profile.model_name"] == "other"
