"""The profile that ships with the package is what `calibrate` makes, and it is found and used without being named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from seqkv_edge import calibrate, cli, llama, model, profile
from seqkv_edge.dropin import KvOptions
from seqkv_edge.engine import open_model
from seqkv_edge.errors import SeqkvError
from seqkv_edge.gguf_meta import fingerprint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
import tiny  # noqa: E402

SHIPPED = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct.seqkv.gguf"


@pytest.fixture(scope="module")
def default_model() -> Path:
    try:
        path = Path(model.default_model())
    except SeqkvError as error:
        pytest.skip(str(error))
    return path


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Those of the live cache."""
    return {t.name: np.array(t.data, np.float64) for t in GGUFReader(path).tensors if "delta" not in t.name}


@pytest.mark.model
def test_shipped_profile_is_of_the_default_model_and_found(default_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(profile, "beside", lambda _model: tmp_path / "none.gguf")
    found = profile.find(default_model, fingerprint(default_model))
    assert found is not None and found.read_bytes() == SHIPPED.read_bytes()


@pytest.mark.model
def test_calibration_remakes_the_shipped_profile(default_model: Path, tmp_path: Path) -> None:
    """Numbers differ in the last bits between processors, and quantized weights amplify that: hence the tolerances (observed: E .05, and .1 where products are AMX's)."""
    with open_model(default_model) as loaded:
        assert loaded.pointer
        made = calibrate.measure(loaded.pointer, default_model, calibrate.default_text(), quality=False)
    target = tmp_path / "p.gguf"
    profile.write(target, default_model, fingerprint(default_model), made)
    here, there = profile.read_info(target), profile.read_info(SHIPPED)
    assert (here.model_id, here.n_tokens, here.n_layer) == (there.model_id, there.n_tokens, there.n_layer)
    ours, theirs = tensors(target), tensors(SHIPPED)
    assert ours.keys() == theirs.keys() and len(ours) == 30 * 4
    if here.text_sha256 != there.text_sha256:
        pytest.skip("this Python ships another version of the text that the profile was made from")
    for name, value in ours.items():
        if name.endswith("k_encode"):  # E is unique up to a rotation within groups of equal weight, E^T E is unique
            pairs = ((a.T @ a, b.T @ b) for a, b in zip(value, theirs[name]))
            assert all(np.linalg.norm(a - b) < 0.15 * np.linalg.norm(b) for a, b in pairs), name
        else:
            assert np.linalg.norm(value - theirs[name]) < 0.05 * np.linalg.norm(theirs[name]), name
    fields = [GGUFReader(path).fields for path in (target, SHIPPED)]
    for kv in llama.OUR_TYPES:
        for kind in "kv":
            a, b = (np.array(f[f"seqkv.profile.{kv}.{kind}_bits"].contents()) for f in fields)
            assert (a != b).sum() <= 3 and np.abs(a - b).max() <= 1
    assert all(0 < kld < 0.05 for kld in there.quality.values()) and there.quality.keys() == set(llama.OUR_TYPES)


def test_automatic_profiles_get_predictors_for_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Only for sessions, only if they are small and soon made; what is missing and how to get it is one line; 'calibrate --predictors' adds them to the profile in use."""
    monkeypatch.setattr(profile, "cache_dir", lambda: tmp_path / "cache")
    path = tiny.write(tmp_path / "tiny.gguf", tiny.SPECS["llama"], "llama")
    kept = tmp_path / "cache" / f"{fingerprint(path)}.gguf"

    def made(*, predictors: bool) -> tuple[bool, str]:
        with open_model(path, ngl=0) as loaded, loaded.context(llama.KvSpec.parse("seqkv3"), n_ctx=256, options=KvOptions(predictors=predictors)):
            assert loaded.profile == kept
        return profile.has_predictors(kept), capsys.readouterr().err

    there, err = made(predictors=False)
    assert not there and "has no profile yet" in err
    assert made(predictors=False) == (False, "")
    share = profile.SHARE
    monkeypatch.setattr(profile, "SHARE", 1e-6)
    there, err = made(predictors=True)
    assert not there and "are stored without coding: predictors would take" in err and err.count("\n") == 1
    monkeypatch.setattr(profile, "SHARE", share)
    monkeypatch.setattr(profile, "PATIENCE", 0.0)
    there, err = made(predictors=True)
    assert not there and "'calibrate --predictors' does it" in err and err.count("\n") == 1
    monkeypatch.setattr(calibrate, "add_predictors", interrupt)
    monkeypatch.setattr(profile, "PATIENCE", 600.0)
    there, err = made(predictors=True)
    assert not there and err.splitlines()[-1].endswith("are stored without coding: interrupted")
    monkeypatch.undo()
    monkeypatch.setattr(profile, "cache_dir", lambda: tmp_path / "cache")
    before = tensors(kept)
    assert cli.main(["calibrate", "--model", str(path), "--predictors"]) == 0
    assert str(kept) in capsys.readouterr().out and profile.has_predictors(kept) and not profile.beside(path).exists()
    assert all(np.array_equal(data, before[name]) for name, data in tensors(kept).items())
    kept.unlink()
    there, err = made(predictors=True)
    assert there and "about" in err
    assert made(predictors=True) == (True, "")


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
