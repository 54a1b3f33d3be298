"""Pictures of a run."""

import json
from pathlib import Path

from captioner.files import replacing


def plot_losses(metrics_path: Path, image_path: Path) -> None:
    """Training and validation loss, and CIDEr on a second axis, over steps: metrics.jsonl → PNG."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics_path.read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    val = [line for line in lines if line["split"] == "val"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    losses = figure.subplots()
    losses.plot([line["step"] for line in train], [line["loss"] for line in train], color="#9db8d9", linewidth=1, label="training loss")
    losses.plot([line["step"] for line in val], [line["loss"] for line in val], color="#1f5fa8", marker="o", markersize=4, label="validation loss")
    losses.set_xlabel("step")
    losses.set_ylabel("loss per token")
    later = [line["loss"] for line in [*train, *val] if line["step"] > 0]
    if later:
        losses.set_ylim(0.95 * min(later), 1.05 * max(later))
    scores = losses.twinx()
    scores.plot([line["step"] for line in val], [line["CIDEr"] for line in val], color="#c4622d", marker="s", markersize=4, label="CIDEr (greedy)")
    scores.set_ylabel("CIDEr")
    scores.set_ylim(bottom=0)
    handles = [*losses.get_lines(), *scores.get_lines()]
    losses.legend(handles, [handle.get_label() for handle in handles], loc="center right")
    losses.spines["top"].set_visible(False)
    scores.spines["top"].set_visible(False)
    with replacing(image_path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
