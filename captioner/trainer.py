"""One optimiser step, an evaluation and a checkpoint: what the loop in train.py is made of.

Legend: B images, G captions per image, T text tokens.
"""

import contextlib
import dataclasses
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from captioner import checkpoint, checkpoint_store, collapse, generate, metrics, preflight, report, weights
from captioner.checkpoint_store import Checkpoint
from captioner.cli import say
from captioner.cuda_graphs import FullBatches, Recorder, StepGraphs
from captioner.errors import UserError
from captioner.files import describe_os_error, save_tensors, sync, write_json
from captioner.job import write_bad_images
from captioner.model import Captioner
from captioner.processes import Processes
from captioner.run_config import checked_settings
from captioner.runtime import encode_images
from captioner.tokenizer import Tokenizer
from data.buckets import bucket_edges
from data.bad_images import BadImageLedger, BadRow
from data.rows import Row

SHOWN_CAPTIONS, PRINTED_CAPTIONS, NAMED_IMAGES = 12, 4, 8


@dataclass
class TrainState:
    """All that changes while training besides weights and optimiser moments; everything random is a function of (seed, step)."""

    step: int = 0  # optimiser steps done
    turns: int = 0  # turns of data/schedule.py that are over
    losses: list[float] = field(default_factory=list)  # of the steps since the last line of metrics.jsonl
    evaluated: int | None = None  # step of the last evaluation
    scores: dict = field(default_factory=dict)  # of the last evaluation
    best: list[float] | None = None  # scores of the best checkpoint, higher is better, the first one counts most
    best_step: int | None = None
    best_scores: dict | None = None
    metrics_bytes: int = 0  # length of metrics.jsonl
    finished: bool = False  # the last step was evaluated
    bad_images: list[dict] = field(default_factory=list)  # those that were met

    @classmethod
    def of(cls, saved: Checkpoint) -> "TrainState":
        """The state in a checkpoint. Raises UserError where it is that of another program."""
        where = f"{saved.path / checkpoint_store.MARK}: state"
        state = cls(**checked_settings(cls, saved.state, where))
        lacking = sorted({field.name for field in dataclasses.fields(cls)} - saved.state.keys())
        if lacking or state.step != saved.step or min(state.turns, state.metrics_bytes) < 0:
            raise UserError(f"{where} is not that of a training at step {saved.step}" + (f": it lacks {', '.join(lacking)}" if lacking else ""))
        return state


class StepLoss(nn.Module):
    """The loss of a micro-batch as a forward pass, which is what DistributedDataParallel can wrap."""

    def __init__(self, model: Captioner, trainable: Iterable[Tensor], device: torch.device, label_smoothing: float, trains_vision: bool):
        super().__init__()
        self.model, self.device, self.label_smoothing, self.trains_vision = model, device, label_smoothing, trains_vision
        self.trainable = list(trainable)

    def forward(self, batch: dict[str, Tensor] | None) -> Tensor:
        """Loss summed over tokens, a scalar, of `step_inputs`; of None (no micro-batch for this process) a zero that all trained parameters are part of."""
        if batch is None:
            return sum(parameter.sum() for parameter in self.trainable) * 0.0
        memory = encode_images(self.model, batch, self.device, self.trains_vision)
        loss, _ = self.model.loss(memory, batch["labels"].to(self.device), self.label_smoothing)
        return loss


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
    added parts that have streams of their own. Of several processes, each one has a Trainer; the first one alone writes.
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
        processes: Processes = Processes(),
        ledger: BadImageLedger | None = None,
        micro_batches: int = 1,
    ):
        self.settings, self.run, self.model, self.tokenizer, self.trainable, self.facts = settings, run, model, tokenizer, trainable, facts
        self.device, self.tracker, self.val_rows, self.seed_adapters, self.processes = device, tracker, val_rows, seed_adapters, processes
        # With --shard, what autocast keeps of the weights would be whole.
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=not settings.shard)
        self.trains_vision = any(name.startswith("vision.") for name in trainable)
        self.step_loss = self.over_processes()
        self.optimizer = make_optimizer(self.trainable, settings, device)
        self.update = self.update_weights
        if settings.cuda_graphs:
            full = FullBatches(settings.batch_size, bucket_edges(settings.max_caption_tokens))
            self.update = StepGraphs(self.update_weights, Recorder(device), full)
        self.ledger = BadImageLedger() if ledger is None else ledger
        self.per_turn = micro_batches
        self.places = [0]  # of this process's micro-batches in the turn
        self.caption_tokens = min(30, settings.max_caption_tokens)  # of an evaluation's captions
        self.state = TrainState()
        self.saved: Checkpoint | None = None  # the checkpoint of the present step, if there is one
        embedded = [part for part in ("vision", "text") if facts.get(part, {}).get("embedded")]
        self.checkpoint_bytes = preflight.checkpoint_bytes(model, self.trainable, embedded)

    def over_processes(self) -> nn.Module:
        """The module of a micro-batch's loss, whose gradients are averaged over the processes."""
        step_loss = StepLoss(self.model, self.trainable.values(), self.device, self.settings.label_smoothing, self.trains_vision)
        if self.processes.count == 1:
            return step_loss
        self.processes.wait()  # what follows gives up after minutes
        with warnings.catch_warnings():
            # Its successor is not in torch 2.6.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return DistributedDataParallel(step_loss, broadcast_buffers=False)

    def set_training(self, training: bool) -> None:
        """Dropout on or off. A frozen image encoder stays in eval mode; a frozen decoder keeps T5's dropout while adapters train, as it was trained with."""
        self.model.train(training)
        if not self.trains_vision:
            self.model.vision.eval()

    def train_step(self, batches: list[dict], lr: float) -> tuple[float, float]:
        """One optimiser step over this process's micro-batches, each token of all weighing the same; (loss per token, gradient norm).

        Raises UserError where they are not finite.
        """
        self.set_training(True)
        self.set_lr(lr)
        self.places = [batch["batch_index"] % self.per_turn for batch in batches]
        self.seed_micro_batch(0)
        losses, norm = self.update([step_inputs(batch) for batch in batches])
        *losses, norm = torch.cat([losses, norm.reshape(1)]).tolist()  # one wait for the device
        loss = self.processes.sum([sum(losses)])[0]
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.refuse_non_finite(loss, norm, losses, batches)
        self.state.step += 1
        self.saved = None
        return loss, norm

    def update_weights(self, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """The work of a step over the `step_inputs` of its micro-batches: their shares of the loss per token (one each) and the gradient norm.

        In one process and with one micro-batch, nothing here waits for the device, so that a CUDA graph can hold it.
        """
        total, count = self.tokens_of_all(batches), self.processes.count
        losses = []
        micro_batches = self.micro_batches(batches)
        for index, batch in enumerate(micro_batches):
            if index:
                self.seed_micro_batch(index)
            is_last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if is_last or count == 1 else self.step_loss.no_sync():
                with self.autocast:
                    loss = self.step_loss(batch)
                # Gradients are averaged over the processes.
                (loss * count / total).backward()
            losses.append(loss.detach() / total)
        norm = self.clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses), norm

    def micro_batches(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor] | None]:
        """This process's micro-batches of a step, [None] where there are none."""
        return batches or [None]

    def clip_gradients(self) -> Tensor:
        """Limit the norm of the gradient; what it was, a scalar."""
        return torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), self.settings.clip)

    def try_batch(self, batch: dict, attempt: int) -> None:
        """Forward and backward of a batch as a step does it, with the masks of another micro-batch at each attempt; gradients are left."""
        self.set_training(True)
        self.seed_masks(attempt)
        with self.autocast:
            loss = self.step_loss(step_inputs(batch))
        (loss / batch["labels"].numel()).backward()

    def tokens_of_all(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """Tokens in the labels of all processes' micro-batches, a scalar on the device."""
        own = [(batch["labels"] != -100).sum() for batch in batches]
        if self.processes.count == 1:
            return sum(own).to(self.device)
        return torch.tensor(self.processes.sum([float(sum(own))])[0], device=self.device)

    def refuse_non_finite(self, loss: float, norm: float, losses: list[float], batches: list[dict]) -> None:
        """Raises UserError that names the step, the images and the last good checkpoint; all of it goes to non_finite.json."""
        step, what = self.state.step + 1, "gradient" if math.isfinite(loss) else "loss"
        own = [{"loss": repr(value), "ids": batch["ids"]} for value, batch in zip(losses, batches)]
        every = [batch for batches in self.processes.everyone(own) for batch in batches]
        guilty = [batch for batch in every if not math.isfinite(float(batch["loss"]))] or every
        ids = [image for batch in guilty for image in batch["ids"]]
        if self.processes.is_main:
            write_json(self.run / "non_finite.json", {"step": step, "what": what, "gradient_norm": repr(norm), "micro_batches": every})
        named = ", ".join(ids[:NAMED_IMAGES]) + (f" and {len(ids) - NAMED_IMAGES} more (non_finite.json)" if len(ids) > NAMED_IMAGES else "")
        last = next(iter(checkpoint_store.present(self.run)), None)
        raise UserError(f"non-finite {what} at step {step}, images {named}; the last good checkpoint is {last or 'none'}")

    def set_lr(self, lr: float) -> None:
        """In place where it is a tensor."""
        for group in self.optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def seed_micro_batch(self, index: int) -> None:
        """All masks become a function of (seed, step, place of this process's micro-batch in the turn)."""
        self.seed_masks(self.places[index] if index < len(self.places) else 0)

    def seed_masks(self, number: int) -> None:
        """All masks become a function of (seed, step, number)."""
        place = (self.state.step << 12) + number
        torch.manual_seed(((self.settings.seed << 40) + place) % 2**63)
        self.seed_adapters(self.settings.seed, place)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[dict | None]) -> tuple[dict, list[dict]]:
        """Loss per token over all captions, CIDEr of greedy captions and the measures of collapse.py: (scores, rows of id, caption, reference).

        Each process gets its share of the batches, and None in turns without one; the sums are those of one process, to the last bit.
        """
        self.set_training(False)
        found = []
        for batch in batches:
            outcome = self.look_at(None if batch is None else step_inputs(batch))
            if batch is None:
                continue
            loss, count, ids = outcome
            facts = {"loss": loss.item(), "tokens": int(count), "ids": batch["ids"], "captions": self.tokenizer.decode(ids)}
            facts |= {"ended": collapse.ended(ids, self.tokenizer.eos_id), "references": batch["captions"]}
            found.append(facts | {"batch_index": batch["batch_index"]})
        everyone = [facts for own in self.processes.gather(found) or [] for facts in own]
        return self.processes.share(self.score(sorted(everyone, key=lambda facts: facts["batch_index"])) if self.processes.is_main else None)

    def look_at(self, batch: dict[str, Tensor] | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Summed loss, number of tokens and ids of greedy captions of the `step_inputs` of a batch; of None, a turn without one, nothing."""
        if batch is None:
            return None
        with self.autocast:
            memory = encode_images(self.model, batch, self.device)
            loss, count = self.model.loss(memory, batch["labels"].to(self.device))
            return loss, count, self.greedy(memory)

    def greedy(self, memory: Tensor) -> Tensor:
        """Ids of greedy captions."""
        return generate.greedy(self.model, memory, max_new_tokens=self.caption_tokens)

    def score(self, found: list[dict]) -> tuple[dict, list[dict]]:
        """The scores of an evaluation from the facts of its batches, in order."""
        captions, references, ended = ([value for facts in found for value in facts[name]] for name in ("captions", "references", "ended"))
        if not captions:
            raise UserError("no image of the validation split can be read")
        cider, _ = metrics.cider(captions, references, tokenize="ptb")
        scores = {"loss": sum(facts["loss"] for facts in found) / sum(facts["tokens"] for facts in found), "CIDEr": cider, "n": len(captions)}
        ids = [image_id for facts in found for image_id in facts["ids"]]
        rows = [{"id": image_id, "caption": caption, "reference": texts[0]} for image_id, caption, texts in zip(ids, captions, references, strict=True)]
        return scores | collapse.measure(captions, ended), rows

    def save(self) -> None:
        """A checkpoint of this step with all that a resume needs, unless there is one; then those that are not kept are deleted."""
        if self.saved is not None:
            return
        self.collect_bad_images()
        with self.whole_weights():
            if not self.processes.is_main:
                self.saved = Checkpoint(self.run, {})
                return
            with self.writing():
                self.saved = checkpoint_store.write(self.run, self.state.step, self.write_files, self.complete_state())
                self.prune()

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[dict[str, Tensor]]:
        """In the body, the main process can save the model; gives what is trained by name. To be entered by all processes together."""
        yield self.trainable

    def prune(self) -> None:
        """Delete the checkpoints that are not kept, once the present one is whole."""
        checkpoint_store.prune(self.run, self.settings.keep_last, self.state.step, self.state.best_step)

    def write_files(self, directory: Path) -> None:
        """The files of a checkpoint."""
        checkpoint.save_weights(self.model, self.tokenizer, self.facts, directory)
        names = {parameter: name for name, parameter in self.trainable.items()}
        checkpoint.save_optimizer(self.optimizer, names, directory / "optimizer.safetensors")

    def try_saving(self) -> None:
        """Write a checkpoint with moments, which the optimiser has none of yet, read it back, and remove it. To be called by all processes together.

        Raises UserError where it can not be written, or lacks a trained parameter.
        """

        def write(directory: Path) -> None:
            self.write_files(directory)
            save_tensors(directory / "optimizer.safetensors", preflight.moments_like(trainable))

        def read(directory: Path) -> None:
            saved = [item for file in sorted(directory.rglob("*.safetensors")) for item in weights.read_state_dict(file).items()]
            # PEFT keeps the prompts of encoder and decoder in one tensor.
            parts = [part for name, tensor in saved for part in (tensor, *(tensor.chunk(2) if name == "prompt_embeddings" else ()))]
            found = Counter(weights.fingerprint({"": part}) for part in parts)
            lost = []
            for name, parameter in trainable.items():
                found[weights.fingerprint({"": parameter})] -= 1
                lost += [name] if found[weights.fingerprint({"": parameter})] < 0 else []
            if lost:
                raise UserError(f"a checkpoint of this training would lack {len(lost)} trained parameters: {', '.join(lost[:NAMED_IMAGES])}")

        with self.whole_weights() as trainable:
            if self.processes.is_main:
                self.checkpoint_bytes = preflight.check_writing(self.run, write, read, self.checkpoint_bytes)

    def collect_bad_images(self) -> None:
        """Note in the ledger, the state and bad_images.jsonl what images any process found bad. To be called by all processes together."""
        found = {bad["path"]: bad for own in self.processes.everyone(self.ledger.to_list()) for bad in own}
        self.state.bad_images = [found[path] for path in sorted(found)]
        for bad in self.state.bad_images:
            self.ledger.record(BadRow(**bad))
        if self.processes.is_main and self.ledger:
            with self.writing():
                write_bad_images(self.run, self.ledger)

    def complete_state(self) -> dict:
        """The state as a checkpoint keeps it, with the length of metrics.jsonl, once that is on the disk. Raises UserError where lines of it are lost."""
        path = self.run / "metrics.jsonl"
        if path.exists():
            sync(path)
        length = path.stat().st_size if path.exists() else 0
        if length < self.state.metrics_bytes:
            raise UserError(f"{path} has lost lines: it has {length} bytes, and had {self.state.metrics_bytes}")
        self.state.metrics_bytes = length
        return dataclasses.asdict(self.state)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Errors of the disk in the body become UserErrors that name the file, the bytes of a checkpoint, and the checkpoint that is still whole."""
        try:
            yield
        except (OSError, UserError) as error:
            if isinstance(error, UserError) and preflight.system_error(error) is None:
                raise
            reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
            left = "" if "is whole" in reason else checkpoint_store.kept(self.run)
            raise UserError(f"{reason}{left} (a checkpoint: {preflight.needed_and_free(self.run, self.checkpoint_bytes)})") from error

    def restore(self, saved: Checkpoint) -> None:
        """State and optimiser of a checkpoint, and metrics.jsonl as it was then; the weights were loaded with the model."""
        self.state = TrainState.of(saved)
        if self.state.step:
            self.load_moments(saved.path / "optimizer.safetensors")
        path = self.run / "metrics.jsonl"
        length = path.stat().st_size if path.exists() else 0
        if length < self.state.metrics_bytes:
            raise UserError(f"{path} has {length} bytes, {saved.path} was saved with {self.state.metrics_bytes}: lines of it are lost")
        if self.processes.is_main:
            if path.exists():
                os.truncate(path, self.state.metrics_bytes)
            checkpoint_store.clear_leftovers(self.run)
            self.prune()
        self.saved = saved

    def load_moments(self, path: Path) -> None:
        """The optimiser's moments of a checkpoint."""
        checkpoint.load_optimizer(self.optimizer, self.trainable, path)

    def log(self, split: str, values: dict[str, float], **more) -> None:
        """One line of metrics.jsonl; the numbers also go to the tracker."""
        self.append("metrics.jsonl", {"step": self.state.step, "split": split, **values, **more})
        self.tracker(self.state.step, {f"{split}/{name}": value for name, value in values.items()})

    def log_times(self, values: dict[str, float]) -> None:
        """One line of timing.jsonl: what differs from run to run stays out of metrics.jsonl."""
        self.append("timing.jsonl", {"step": self.state.step, **values})
        self.tracker(self.state.step, {f"timing/{name}": value for name, value in values.items()})

    def append(self, name: str, line: dict) -> None:
        """A line at the end of a file of the run."""
        if self.processes.is_main:
            with self.writing(), open(self.run / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def evaluate_and_save(self, batches: Iterable[dict | None], total: int) -> collapse.Collapse | None:
        """Save, evaluate, log, plot, write the run's report, publish the best and print a few captions; what is wrong with the captions, if anything.

        total: steps of the whole training. Until the state says that this step was evaluated, all of it can be done again with the same result.
        """
        self.save()
        scores, rows = self.evaluate(batches)
        state = self.state
        score = [scores["CIDEr"], -scores["loss"]] if self.settings.best_by == "CIDEr" else [-scores["loss"]]
        found = collapse.diagnose(scores, state.best_scores, self.reference_measures(), state.step / total)
        # With --best-by loss the scores of collapsed captions may be the best ones; NaN would stay the best for ever.
        is_collapsed = not math.isfinite(scores["loss"]) or (found is not None and found.since_best)
        is_best = not is_collapsed and (state.best is None or score > state.best)
        if is_best:
            state.best, state.best_step, state.best_scores = score, state.step, scores | {"step": state.step}
        state.evaluated, state.scores, state.finished = state.step, scores, state.step == total
        self.log("val", scores, captions=rows[:SHOWN_CAPTIONS])
        self.collect_bad_images()
        if self.processes.is_main:
            with self.writing():
                report.plot_losses(self.run)
                report.write_training_report(self.run, self.report_facts(), self.val_rows)
                if is_best:
                    checkpoint_store.publish(self.run, self.saved.path, checkpoint.PUBLISHED)
                self.saved = checkpoint_store.restate(self.saved, self.complete_state())
                self.prune()
        say(f"step {state.step}: val loss {scores['loss']:.4f}, CIDEr {scores['CIDEr']:.3f} (greedy, {scores['n']} images){', best so far' if is_best else ''}")
        for row in rows[:PRINTED_CAPTIONS]:
            say(f"    {row['id']}: {row['caption'] or '(empty)'}    [reference: {row['reference']}]")
        if found:
            say(f"warning: {found.line}")
        return found

    def reference_measures(self) -> dict[str, float]:
        """What healthy captions of the validation split look like: its first references."""
        texts = [row.captions[0] for row in self.val_rows if row.captions]
        return collapse.measure(texts, [len(ids) <= self.caption_tokens for ids in self.tokenizer.encode(texts)])

    def roll_back(self) -> None:
        """Leave the best checkpoint as the newest one; its files are at the top of the run already."""
        if self.processes.is_main:
            checkpoint_store.roll_back(self.run, self.state.best_step)

    def report_facts(self) -> dict[str, str]:
        """What the run's report says about the run."""
        settings = self.settings
        adapters = f"rank {settings.lora_rank} on {', '.join(settings.lora_targets)} of {', '.join(settings.lora_where)}" if settings.lora_targets else "none"
        parts = {"adapters": ", ".join(self.facts["adapters"]), "soft prompt": ", ".join(self.facts["prompt"]), "frozen": ", ".join(self.facts["frozen"])}
        return {
            "image encoder": self.facts["vision"]["name"] + (f", {self.model.views} views" if self.model.views else ""),
            "decoder": Path(self.facts["text"]["name"]).name,
            "LoRA": adapters,
            **{name: value for name, value in parts.items() if value},
            "trained whole": ", ".join(name for name in ("bridge", *settings.train_base) if name not in self.facts["frozen"]),
            "trained parameters": f"{sum(parameter.numel() for parameter in self.trainable.values()):,}",
            "data": f"{Path(settings.data).name}, {settings.val_split}",
            "best step": f"{self.state.best_step} by {settings.best_by}",
        }
