"""Optional experiment trackers: TensorBoard and Weights & Biases, only where asked for by `--report-to`."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path

from captioner.errors import UserError

TRACKERS = ("none", "tensorboard", "wandb")


def open_tracker(name: str, run: Path, settings: dict) -> Callable[[int, dict[str, float]], None]:
    """A function that records {name: value} at a step.

    Weights & Biases stays offline, and so never asks for a login, unless WANDB_MODE or WANDB_API_KEY says otherwise.
    Raises UserError where the tracker's package is not installed.
    """
    if name == "none":
        return lambda step, values: None
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    try:
        package = importlib.import_module(module)
    except ImportError:
        raise UserError(f"--report-to {name} needs the package {name}: python -m pip install {name}") from None
    if name == "tensorboard":
        writer = package.SummaryWriter(run / "tensorboard")

        def write(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return write
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    tracker = package.init(dir=str(run), name=run.name, config=settings, mode=mode)
    return lambda step, values: tracker.log(values, step=step)
