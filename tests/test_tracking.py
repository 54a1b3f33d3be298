"""Trackers are optional, never asked for, and named where missing."""

import sys
from types import SimpleNamespace

import pytest

from captioner.errors import UserError
from captioner.tracking import open_tracker


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(UserError, match=f"--report-to {name} needs the package {name}"):
        open_tracker(name, tmp_path, {})


def test_none_records_nothing(tmp_path):
    open_tracker("none", tmp_path, {})(1, {"train/loss": 2.0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("environment", "mode"), [({}, "offline"), ({"WANDB_API_KEY": "k"}, "online"), ({"WANDB_MODE": "disabled"}, "disabled")])
def test_wandb_never_asks_for_a_login(environment, mode, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []

    def init(**options):
        calls.append(options)
        return SimpleNamespace(log=lambda values, step: calls.append((step, values)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    open_tracker("wandb", tmp_path, {"lr": 1.0})(3, {"val/CIDEr": 0.5})
    assert calls[0]["mode"] == mode and calls[0]["config"] == {"lr": 1.0}
    assert calls[1] == (3, {"val/CIDEr": 0.5})


def test_tensorboard_gets_every_value(tmp_path, monkeypatch):
    written = []
    writer = SimpleNamespace(add_scalar=lambda *call: written.append(call), flush=lambda: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda directory: writer))
    open_tracker("tensorboard", tmp_path, {})(7, {"train/loss": 2.0, "train/lr": 0.1})
    assert written == [("train/loss", 2.0, 7), ("train/lr", 0.1, 7)]
