"""Checkpoints come back as they were, and survive a crash in the middle of writing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from wearfleet_cloud.algorithms import State
from wearfleet_cloud.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, write_atomically
from wearfleet_cloud.training.model_files import load_model, save_model
from wearfleet_cloud.training.selection import Best, Scores
from wearfleet_models import ModelSpec, build_classifier
from wearfleet_protos.errors import IntegrityError, NotFoundError, ShapeError

_CPU = torch.device("cpu")


def _checkpoint(step: int) -> Checkpoint:
    flat = torch.randn(6, generator=torch.Generator().manual_seed(step))
    params = {
        "a": flat[:2],
        "b": flat[2:].reshape(2, 2),
    }  # views of one vector, as the optimisers return them
    state = State(params, {"count": torch.tensor(step)}, {"adam_m/a": flat[1:3]}, {})
    best = {"oracle": Best(step, Scores(0.1 + 0.2, 0.5, 1 / 3, 0.25))}
    return Checkpoint("print", step, state, (best, best), {"a": flat[:2].t()}, 1.5)


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path: Path) -> None:
    before = _checkpoint(7)
    save_checkpoint(tmp_path / "c", before)
    after = load_checkpoint(tmp_path / "c", _CPU)
    torch.testing.assert_close(tuple(after.state), tuple(before.state), rtol=0.0, atol=0.0)
    torch.testing.assert_close(dict(after.kept), dict(before.kept), rtol=0.0, atol=0.0)
    rest = [(c.fingerprint, c.step, c.best, c.seconds) for c in (before, after)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch, moment: str) -> None:
    save_checkpoint(tmp_path / "c", _checkpoint(1))

    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(moment, power_cut)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path / "c", _checkpoint(2))
    assert load_checkpoint(tmp_path / "c", _CPU).step == 1
    save_checkpoint(tmp_path / "c", _checkpoint(3))
    assert load_checkpoint(tmp_path / "c", _CPU).step == 3


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, size: int) -> None:
    save_checkpoint(tmp_path / "c", _checkpoint(1))
    data = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(data[:size])
    with pytest.raises(IntegrityError, match="delete it to start again"):
        load_checkpoint(tmp_path / "c", _CPU)


def test_another_safetensors_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    save_model(build_classifier(ModelSpec("cnn", 3, 40, 4, kernel=5)), tmp_path)
    with pytest.raises(IntegrityError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "model.safetensors", _CPU)


def test_written_files_leave_nothing_beside_them(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"one")
    write_atomically(tmp_path / "file", b"two")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"two")]


@pytest.mark.parametrize("backbone", ["cnn", "transformer"])
def test_a_saved_model_predicts_the_same(tmp_path: Path, backbone: str) -> None:
    model = build_classifier(ModelSpec(backbone, 3, 40, 4, kernel=5, feedforward=16), seed=5).eval()
    model.standardise.mean.fill_(2.0)
    save_model(model, tmp_path)
    x = torch.randn(3, 3, 40)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert torch.equal(load_model(path)(x), model(x))


def test_a_model_that_is_missing_damaged_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"model\.safetensors does not exist"):
        load_model(tmp_path)
    save_model(build_classifier(ModelSpec("cnn", 3, 40, 4, kernel=5)), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(IntegrityError):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(text.replace('"classes": 4', '"classes": 5'))
    with pytest.raises(ShapeError, match="head"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text(text.replace("backbone", "spine"))
    with pytest.raises(IntegrityError, match="does not describe a model"):
        load_model(tmp_path)


def test_a_model_with_nan_is_refused(tmp_path: Path) -> None:
    model = build_classifier(ModelSpec("cnn", 3, 40, 4, kernel=5))
    with torch.no_grad():
        model.head.bias[1] = float("nan")
    save_model(model, tmp_path)
    with pytest.raises(ShapeError, match=r"head\.bias holds NaN"):
        load_model(tmp_path)
