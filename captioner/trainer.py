"""One optimiser step, an evaluation and a checkpoint: what the loop in train.py is made of.

Legend: B images, G captions per image, T text tokens.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from captioner import checkpoint, generate, metrics, report
from captioner.cli import say
from captioner.cuda_graphs import FullBatches, Recorder, StepGraphs
from captioner.errors import UserError
from captioner.files import read_json, write_json
from captioner.model import Captioner
from captioner.runtime import encode_images
from captioner.tokenizer import Tokenizer
from data.buckets import bucket_edges
from data.rows import Row

SHOWN_CAPTIONS, PRINTED_CAPTIONS = 12, 4


@dataclass
class TrainState:
    """All that changes while training besides weights and optimiser moments; everything random is a function of (seed, step)."""

    step: int = 0  # optimiser steps done
    best: list[float] | None = None  # scores of checkpoints/best, higher is better, the first one counts most
    best_step: int | None = None


def make_optimizer(trainable: dict[str, Tensor], settings, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay only on matrices that multiply activations.

    On CUDA the learning rate is a tensor, which CUDA graphs read at every replay.
    """
    decayed = [p for name, p in trainable.items() if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in trainable.items() if p.ndim < 2 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    on_cuda = device.type == "cuda"
    lr = torch.tensor(settings.lr, device=device) if on_cuda else settings.lr
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True, capturable=on_cuda)


def step_inputs(batch: dict) -> dict[str, Tensor]:
    """What a step reads of a batch: features (B, N, D) or pixel_values (B, 3, H, W), and labels (B, G, T) as (B*G, T)."""
    content = "features" if "features" in batch else "pixel_values"
    return {content: batch[content], "labels": batch["labels"].flatten(0, 1)}


class Trainer:
    """What a training loop calls, with `settings` as in train.py; trainable is the list that `lora.set_trainable` returned.

    val_rows are the rows whose batches `evaluate` gets; the report opens the pictures of the first ones. seed_adapters(seed, step) fixes the masks of
    added parts that have streams of their own.
    """

    def __init__(
        self,
        settings,
        run: Path,
        model: Captioner,
        tokenizer: Tokenizer,
        trainable: dict[str, Tensor],
        facts: dict,
        device: torch.device,
        precision: str,
        tracker: Callable[[int, dict[str, float]], None],
        val_rows: Sequence[Row],
        seed_adapters: Callable[[int, int], None] = lambda seed, step: None,
    ):
        self.settings, self.run, self.model, self.tokenizer, self.trainable, self.facts = settings, run, model, tokenizer, trainable, facts
        self.device, self.tracker, self.val_rows, self.seed_adapters = device, tracker, val_rows, seed_adapters
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        self.optimizer = make_optimizer(trainable, settings, device)
        self.update = self.update_weights
        if settings.cuda_graphs:
            full = FullBatches(settings.batch_size, bucket_edges(settings.max_caption_tokens))
            self.update = StepGraphs(self.update_weights, Recorder(device), full)
        self.state = TrainState()
        self.trains_vision = any(name.startswith("vision.") for name in trainable)

    def set_training(self, training: bool) -> None:
        """Dropout on or off. A frozen image encoder stays in eval mode; a frozen decoder keeps T5's dropout while adapters train, as it was trained with."""
        self.model.train(training)
        if not self.trains_vision:
            self.model.vision.eval()

    def train_step(self, batches: list[dict], lr: float) -> tuple[float, float]:
        """One optimiser step over micro-batches, each token weighing the same; (loss per token, gradient norm). Raises UserError where not finite."""
        self.set_training(True)
        self.set_lr(lr)
        self.seed_micro_batch(0)
        loss, norm = torch.stack(self.update([step_inputs(batch) for batch in batches])).tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            kept = f"; the weights of the last evaluation are in {self.run / 'checkpoints' / 'last'}"
            raise UserError(f"non-finite {'loss' if not math.isfinite(loss) else 'gradient'} at step {self.state.step + 1}{kept}")
        self.state.step += 1
        return loss, norm

    def update_weights(self, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """The work of a step over the `step_inputs` of its micro-batches: loss per token and gradient norm, scalars on the device.

        With one micro-batch, nothing here waits for the device, so that a CUDA graph can hold it.
        """
        labels = [batch["labels"].to(self.device) for batch in batches]
        total = sum((micro != -100).sum() for micro in labels)
        loss_sum = torch.zeros((), device=self.device)
        for index, (batch, micro) in enumerate(zip(batches, labels, strict=True)):
            if index:
                self.seed_micro_batch(index)
            with self.autocast:
                memory = encode_images(self.model, batch, self.device, self.trains_vision)
                loss, _ = self.model.loss(memory, micro, self.settings.label_smoothing)
            (loss / total).backward()
            loss_sum += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_sum / total, norm

    def set_lr(self, lr: float) -> None:
        """In place where it is a tensor."""
        for group in self.optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def seed_micro_batch(self, index: int) -> None:
        """All masks become a function of (seed, step, micro-batch)."""
        place = (self.state.step << 12) + index
        torch.manual_seed(((self.settings.seed << 40) + place) % 2**63)
        self.seed_adapters(self.settings.seed, place)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[dict]) -> tuple[dict, list[tuple[str, str, str]]]:
        """Loss per token over all captions and CIDEr of greedy captions; (scores, rows of image id, caption, first reference)."""
        self.set_training(False)
        loss_sum, tokens, rows, references = 0.0, 0, [], []
        for batch in batches:
            with self.autocast:
                memory = encode_images(self.model, batch, self.device)
                loss, count = self.model.loss(memory, batch["labels"].flatten(0, 1).to(self.device))
                ids = generate.greedy(self.model, memory, max_new_tokens=min(30, self.settings.max_caption_tokens))
            loss_sum, tokens = loss_sum + loss.item(), tokens + int(count)
            captions = self.tokenizer.decode(ids)
            rows += [(image_id, caption, texts[0]) for image_id, caption, texts in zip(batch["ids"], captions, batch["captions"], strict=True)]
            references += batch["captions"]
        if not rows:
            raise UserError("no image of the validation split can be read")
        cider, _ = metrics.cider([caption for _, caption, _ in rows], references, tokenize="ptb")
        return {"loss": loss_sum / tokens, "CIDEr": cider, "n": len(rows)}, rows

    def save(self, is_best: bool) -> None:
        """checkpoints/last with all that a resume needs; where best, checkpoints/best and the files at the top of the run."""

        def write_weights(directory: Path) -> None:
            checkpoint.save_weights(self.model, self.tokenizer, self.facts, directory)
            write_json(directory / "state.json", dataclasses.asdict(self.state))

        def write_all(directory: Path) -> None:
            write_weights(directory)
            names = {parameter: name for name, parameter in self.trainable.items()}
            checkpoint.save_optimizer(self.optimizer, names, directory / "optimizer.safetensors")

        if is_best:
            checkpoint.publish(self.run, checkpoint.save_checkpoint(self.run, "best", write_weights))
        checkpoint.save_checkpoint(self.run, "last", write_all)

    def restore(self) -> None:
        """State and optimiser of checkpoints/last; the weights were loaded with the model."""
        last = self.run / "checkpoints" / "last"
        self.state = TrainState(**read_json(last / "state.json"))
        if self.state.step:
            checkpoint.load_optimizer(self.optimizer, self.trainable, last / "optimizer.safetensors")

    def log(self, split: str, values: dict[str, float], **more) -> None:
        """One line of metrics.jsonl; the numbers also go to the tracker."""
        line = {"step": self.state.step, "split": split, **values, **more}
        with open(self.run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.tracker(self.state.step, {f"{split}/{name}": value for name, value in values.items()})

    def evaluate_and_save(self, batches: Iterable[dict]) -> dict:
        """Evaluate, save, log, plot, write the run's report and print a few captions."""
        scores, rows = self.evaluate(batches)
        score = [scores["CIDEr"], -scores["loss"]] if self.settings.best_by == "CIDEr" else [-scores["loss"]]
        is_best = self.state.best is None or score > self.state.best
        if is_best:
            self.state.best, self.state.best_step = score, self.state.step
        self.save(is_best)
        shown = [{"id": image_id, "caption": caption, "reference": reference} for image_id, caption, reference in rows[:SHOWN_CAPTIONS]]
        self.log("val", scores, captions=shown)
        report.plot_losses(self.run)
        report.write_training_report(self.run, self.report_facts(), self.val_rows)
        say(f"step {self.state.step}: val loss {scores['loss']:.4f}, CIDEr {scores['CIDEr']:.3f} (greedy, {scores['n']} images){', best so far' if is_best else ''}")
        for row in shown[:PRINTED_CAPTIONS]:
            say(f"    {row['id']}: {row['caption'] or '(empty)'}    [reference: {row['reference']}]")
        return scores

    def report_facts(self) -> dict[str, str]:
        """What the run's report says about the run."""
        settings = self.settings
        adapters = f"rank {settings.lora_rank} on {', '.join(settings.lora_targets)} of {', '.join(settings.lora_where)}" if settings.lora_targets else "none"
        parts = {"adapters": ", ".join(self.facts["adapters"]), "soft prompt": ", ".join(self.facts["prompt"]), "frozen": ", ".join(self.facts["frozen"])}
        return {
            "image encoder": self.facts["vision"]["name"],
            "decoder": Path(self.facts["text"]["name"]).name,
            "LoRA": adapters,
            **{name: value for name, value in parts.items() if value},
            "trained whole": ", ".join(name for name in ("bridge", *settings.train_base) if name not in self.facts["frozen"]),
            "trained parameters": f"{sum(parameter.numel() for parameter in self.trainable.values()):,}",
            "data": f"{Path(settings.data).name}, {settings.val_split}",
            "best step": f"{self.state.best_step} by {settings.best_by}",
        }
