"""The drop-in: an unmodified llama-cpp-python with a seqkv cache.

The models are tiny and random, so texts are nonsense; what is tested is that they are the same nonsense.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import seqkv_edge

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
import tiny

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not any(seqkv_edge.lib_dir().glob("*llama.*")), reason=f"no libraries in {seqkv_edge.lib_dir()}")

TYPES = ("seqkv2", "seqkv3", "seqkv4")
PROMPT = "The quick brown fox jumps over the lazy dog. " * 4  # 180 tokens: more than the exact window


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("dropin") / "llama.gguf", tiny.SPECS["llama"], "llama")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Profiles made on first use go here, not to the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("HOME", str(folder))
        yield folder


def make(model_path: Path, **changes: Any) -> Any:
    from llama_cpp import Llama

    arguments: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "seed": 1}
    return Llama(model_path=str(model_path), **{**arguments, **changes})


def complete(llm: Any, prompt: str = PROMPT, n: int = 24) -> str:
    return llm.create_completion(prompt, max_tokens=n, temperature=0.0)["choices"][0]["text"]


def test_libraries_are_ours() -> None:
    import llama_cpp.llama_cpp as api

    assert Path(api._lib._name).parent == seqkv_edge.lib_dir()
    assert hasattr(api._lib, "llama_seqkv_type")


def test_flag() -> None:
    flags = {name: seqkv_edge.kv(name) for name in TYPES}
    assert len({(f["type_k"], f["type_v"]) for f in flags.values()}) == 3
    assert all(f["type_k"] == f["type_v"] and isinstance(f["type_k"], int) for f in flags.values())
    mixed = seqkv_edge.kv("seqkv4:seqkv2")
    assert (mixed["type_k"], mixed["type_v"]) == (flags["seqkv4"]["type_k"], flags["seqkv2"]["type_k"])
    assert seqkv_edge.kv("f16")["type_k"] == 1
    for wrong in ("seqkv5", "", "seqkv3:", "seqkv3:seqkv3:seqkv3"):
        with pytest.raises(seqkv_edge.SeqkvError) as caught:
            seqkv_edge.kv(wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kv", TYPES)
@pytest.mark.parametrize("flash_attn", [None, False, True])
def test_completion(model_path: Path, kv: str, flash_attn: bool | None) -> None:
    arguments = seqkv_edge.kv(kv)
    if flash_attn is not None:
        arguments["flash_attn"] = flash_attn
    llm = make(model_path, **arguments)
    first = complete(llm)
    assert len(first) >= 1
    llm.reset()
    assert complete(make(model_path, **seqkv_edge.kv(kv))) == first


def test_four_bits_answer_as_f16_at_first(model_path: Path) -> None:
    """Inside the exact window there is no difference at all."""
    prompt = "Hello"
    assert complete(make(model_path, **seqkv_edge.kv("seqkv4")), prompt) == complete(make(model_path), prompt)


def test_plain_integers(model_path: Path) -> None:
    """type_k= and type_v= as any script has them, without the dictionary of kv()."""
    from seqkv_edge import llama

    number = llama.type_id("seqkv3")
    assert complete(make(model_path, type_k=number, type_v=number)) == complete(make(model_path, **seqkv_edge.kv("seqkv3")))
    assert len(complete(make(model_path, type_k=number))) >= 1  # V stays f16, if that is allowed


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
def test_types_of_upstream_still_work(model_path: Path, kv: str) -> None:
    assert len(complete(make(model_path, **seqkv_edge.kv(kv)))) >= 1


def test_chat_streaming(model_path: Path) -> None:
    llm = make(model_path, **seqkv_edge.kv("seqkv3"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a cache? " * 6}]
    chunks = list(llm.create_chat_completion(messages, max_tokens=24, temperature=0.0, stream=True))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    streamed = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    llm.reset()
    whole = llm.create_chat_completion(messages, max_tokens=24, temperature=0.0)
    assert whole["choices"][0]["message"]["content"] == streamed
    assert streamed


@pytest.mark.parametrize("kv", TYPES)
def test_save_and_load_state(model_path: Path, kv: str) -> None:
    llm = make(model_path, **seqkv_edge.kv(kv))
    tokens = llm.tokenize(PROMPT.encode())
    llm.eval(tokens)
    state = llm.save_state()
    want = greedy(llm, 20)
    llm.load_state(state)
    assert llm.n_tokens == len(tokens)
    assert greedy(llm, 20) == want
    other = make(model_path, **seqkv_edge.kv(kv))
    other.load_state(state)
    assert greedy(other, 20) == want


def greedy(llm: Any, n: int) -> list[int]:
    out = [70]  # a state holds no logits: go on with some token
    for _ in range(n):
        llm.eval(out[-1:])
        out.append(llm.sample(temp=0.0))
    return out


def test_state_of_another_type_is_refused(model_path: Path) -> None:
    llm, other = make(model_path, **seqkv_edge.kv("seqkv3")), make(model_path, **seqkv_edge.kv("seqkv4"))
    llm.eval(llm.tokenize(PROMPT.encode()))
    with pytest.raises(RuntimeError):
        other.load_state(llm.save_state())


def test_ram_cache(model_path: Path) -> None:
    """llama-cpp-python's own prompt cache saves and loads states."""
    from llama_cpp import LlamaRAMCache

    llm = make(model_path, **seqkv_edge.kv("seqkv3"))
    want = complete(llm)
    llm.reset()
    llm.set_cache(LlamaRAMCache(1 << 26))
    assert complete(llm) == want
    complete(llm, "Something else entirely")
    assert complete(llm) == want


def evaluated(llm: Any) -> list[int]:
    """Numbers of tokens of the calls to eval from now on."""
    counts: list[int] = []
    original = llm.eval

    def count(tokens: Any) -> None:
        counts.append(len(list(tokens)))
        original(tokens)

    llm.eval = count
    return counts


def test_prefix_reuse(model_path: Path) -> None:
    """A prompt that continues what is in the cache evaluates what is new alone."""
    llm = make(model_path, **seqkv_edge.kv("seqkv3"))
    n_prompt = len(llm.tokenize(PROMPT.encode()))
    answer = complete(llm, PROMPT, 8)
    counts = evaluated(llm)
    more = complete(llm, PROMPT + "And then? ", 8)
    assert counts[0] < 16 < n_prompt  # all but the last words
    assert len(answer) >= 1 and len(more) >= 1
    counts.clear()
    complete(llm, "Other " + PROMPT, 1)
    assert counts[0] > n_prompt - 8


def test_prefix_reuse_inside_the_window_changes_nothing(model_path: Path) -> None:
    prompt = "A short prompt of some thirty "
    llm = make(model_path, **seqkv_edge.kv("seqkv2"))
    complete(llm, prompt, 8)
    assert complete(llm, prompt + "more", 12) == complete(make(model_path, **seqkv_edge.kv("seqkv2")), prompt + "more", 12)


def test_profile(model_path: Path, cache_folder: Path, tmp_path: Path) -> None:
    """Made on first use and kept; profile=None makes none; another model's is refused."""
    fresh = tmp_path / "fresh.gguf"
    tiny.write(fresh, tiny.SPECS["llama-g3"], "fresh")

    def kept() -> set[Path]:
        return {p for p in cache_folder.rglob("*") if p.is_file()}

    before = kept()
    make(fresh, **seqkv_edge.kv("seqkv3", profile=None))
    assert kept() == before
    make(fresh, **seqkv_edge.kv("seqkv3"))
    (profile,) = kept() - before
    stamp = profile.stat().st_mtime_ns
    make(fresh, **seqkv_edge.kv("seqkv4"))
    assert kept() - before == {profile} and profile.stat().st_mtime_ns == stamp
    assert complete(make(fresh, **seqkv_edge.kv("seqkv3", profile=profile))) == complete(make(fresh, **seqkv_edge.kv("seqkv3")))
    with pytest.raises(seqkv_edge.SeqkvError) as caught:
        make(model_path, **seqkv_edge.kv("seqkv3", profile=profile))
    assert "\n" not in str(caught.value)


def test_window_of_whole_context_answers_as_f16(model_path: Path) -> None:
    arguments = seqkv_edge.kv("seqkv2", n_window=512)
    assert complete(make(model_path, **arguments)) == complete(make(model_path))


def test_model_that_cannot_use_the_types(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "d80.gguf", tiny.SPECS["llama-d80"], "d80")
    with pytest.raises((seqkv_edge.SeqkvError, ValueError)) as caught:
        make(path, **seqkv_edge.kv("seqkv3"))
    assert "80" in str(caught.value) and "\n" not in str(caught.value)


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    # the directory that this seqkv_edge was imported from, for a checkout that is not installed
    path = os.pathsep.join([str(Path(seqkv_edge.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    clean = {k: v for k, v in os.environ.items() if k != "LLAMA_CPP_LIB_PATH"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**clean, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_llama_cpp_first_is_a_clear_error() -> None:
    """Simulated: the installed llama_cpp may have no library of its own."""
    done = python(
        """
        import pathlib, shutil, tempfile, os, importlib.util
        spec = importlib.util.find_spec("seqkv_edge")
        ours = pathlib.Path(spec.origin).parent / "lib"
        with tempfile.TemporaryDirectory() as other:
            for path in ours.iterdir():
                shutil.copy(path, other)
            os.environ["LLAMA_CPP_LIB_PATH"] = other
            import llama_cpp
            try:
                import seqkv_edge
            except Exception as error:
                print(error)
        """
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, done
    assert "llama_cpp" in lines[0] and "before" in lines[0] and "seqkv_edge" in lines[0]


def test_either_import_style() -> None:
    for code in (
        "import seqkv_edge; from llama_cpp import Llama; import llama_cpp; print(llama_cpp.llama_cpp._lib._name)",
        "import seqkv_edge, llama_cpp.llama_cpp as c; print(c._lib._name)",
        "import seqkv_edge, seqkv_edge; seqkv_edge.kv('seqkv3'); import llama_cpp; print(llama_cpp.llama_cpp._lib._name)",
    ):
        done = python(code)
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).parent == seqkv_edge.lib_dir()


# -- llama-cpp-python's own tests

SDIST = "llama_cpp_python-0.3.36"
# test_llama.py downloads models for all but the named tests; the other files need nothing
NO_DOWNLOAD = ("test_llama_cpp_version", "test_llama_cpp_tokenization")
# these take a transformer model and compare texts of it with and without reuse of the cache: ours will do
WITH_TINY_MODEL = (
    "test_exact_cached_prompt_reuse_matches_fresh",
    "test_loaded_exact_cached_prompt_reuse_matches_fresh",
    "test_ram_cache_exact_prompt_hit_matches_fresh",
    "test_shorter_prompt_prefix_reuse_matches_fresh",
)

PLUGIN = '''
"""Runs llama-cpp-python's tests on the patched libraries, with `KV` as type of every cache."""
import os, sys, types
import pytest
import seqkv_edge

KV, MODEL = os.environ["TEST_KV"], os.environ["TEST_MODEL"]

def hf_hub_download(repo_id, filename, **_):
    if "stories15M" in filename:
        return MODEL
    pytest.skip("needs a download")

def log_softmax(x, axis=None):
    import numpy as np
    x = x - x.max(axis=axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))

sys.modules["huggingface_hub"] = types.SimpleNamespace(hf_hub_download=hf_hub_download)
scipy, special = types.ModuleType("scipy"), types.ModuleType("scipy.special")
special.log_softmax = log_softmax
scipy.special = special
sys.modules.update({"scipy": scipy, "scipy.special": special})

import llama_cpp
original = llama_cpp.Llama.__init__

def init(self, *args, **kwargs):
    original(self, *args, **{**({} if kwargs.get("vocab_only") else seqkv_edge.kv(KV)), **kwargs})

llama_cpp.Llama.__init__ = init
'''


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tests/ and the vocabulary they load, out of the source distribution that the build fetched."""
    archives = sorted((ROOT / "build").rglob(SDIST + ".tar.gz")) if (ROOT / "build").is_dir() else []
    if not archives:
        pytest.skip(f"no {SDIST}.tar.gz under build/: the libraries were built from elsewhere")
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(archives[0]) as archive:
        for member in archive:
            inside = member.name.partition("/")[2]
            wanted = inside.startswith("tests/") or inside == "vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf"
            source = archive.extractfile(member) if wanted and member.isfile() else None
            if source is not None:
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())
    (folder / "seqkv_plugin.py").write_text(PLUGIN)
    return folder


@pytest.mark.parametrize("kv", ["f16", "seqkv3"])
def test_suite_of_llama_cpp_python(sdist: Path, model_path: Path, kv: str) -> None:
    path = os.pathsep.join([str(sdist), str(Path(seqkv_edge.__file__).parents[1])])
    env = {k: v for k, v in os.environ.items() if k != "LLAMA_CPP_LIB_PATH"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "seqkv_plugin",
            "-p",
            "no:cacheprovider",
            "-v",
            "-rs",
            "-c",
            os.devnull,
            "--rootdir",
            str(sdist),
            "tests",
        ],
        cwd=sdist,
        env={**env, "PYTHONPATH": path, "TEST_KV": kv, "TEST_MODEL": str(model_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (*NO_DOWNLOAD, *WITH_TINY_MODEL):
        assert any(name in line and "PASSED" in line for line in done.stdout.splitlines()), done.stdout
