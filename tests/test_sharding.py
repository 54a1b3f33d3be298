"""Weights shared out over two real processes: training, files, resuming and captions are those of one process that holds them all."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora
from captioner import checkpoint, generate, sharding
from captioner.errors import UserError
from captioner.model import Captioner
from captioner.processes import Processes, start
from captioner.runtime import cast_frozen, recompute_blocks
from captioner.t5 import T5, T5Config
from captioner.tokenizer import Tokenizer, train_tokenizer
from captioner.trainer import StepLoss, make_optimizer
from captioner.vit import VisionConfig, VisionTransformer
from tests.conftest import COLOURS, tiny_train_flags
from tests.launching import launch

CPU = torch.device("cpu")
TEXT = dict(vocab_size=96, d_model=24, d_kv=5, d_ff=40, num_layers=1, num_decoder_layers=2, num_heads=3, dropout_rate=0.0)
SETTINGS = SimpleNamespace(lr=3e-3, weight_decay=0.01)


@dataclasses.dataclass
class Case:
    """What is trained: parts added to frozen backbones that live elsewhere, or backbones that travel with the run, whole. fp64 where 1e-6 is to be certain:
    gradients that are zero but for rounding (biases of keys) make AdamW take steps of any sign in fp32.
    """

    dtype: str = "float64"
    steps: int = 50
    tied: bool = False
    parts: bool = False
    whole: tuple[str, ...] = ()
    recompute: bool = False
    bf16: bool = False  # frozen weights in bf16 beside trained ones in fp32, under autocast
    features: bool = False


CASES = {
    "added": Case(parts=True, recompute=True),
    "whole": Case(tied=True, whole=("vision", "text.embedding", "text.decoder", "text.lm_head")),
    "mixed": Case("float32", steps=10, parts=True, bf16=True, features=True),
}


def build(case: Case) -> tuple[Captioner, dict, dict]:
    """(model, facts, trainable): the same in every process."""
    torch.manual_seed(0)
    vision = VisionTransformer(VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2))
    text = T5(T5Config(**TEXT, tie_word_embeddings=case.tied))
    model = Captioner(vision, text).to(getattr(torch, case.dtype))
    embedded = bool(case.whole)
    facts = checkpoint.no_parts() | {
        "vision": {"name": "ViT", "weights": None, "hash": None if embedded else "1" * 64, "embedded": embedded},
        "text": {"name": "T5", "weights": None, "hash": None if embedded else "2" * 64, "embedded": embedded},
    }
    if case.parts:
        places = ("decoder",) if case.features else ("decoder", "vision")
        lora.apply_lora(model, ("q_proj", "v_proj", "ffn"), places, 3, dropout=0.0)
        # Of one row: nothing of it is left for the second process.
        lora.apply_adapters(model, ("ffn",), places, reduction=16)
        lora.apply_soft_prompt(model, torch.randn(1, TEXT["d_model"], dtype=getattr(torch, case.dtype)), ("decoder", "encoder"))
        facts |= checkpoint.parts_of(model) | {"stack": list(lora.get_stack(model))}
    trainable = lora.set_trainable(model, ("bridge", *case.whole))
    if case.bf16:
        cast_frozen(model, torch.bfloat16, keep=lora.adapter_parameters(model).values())
    if case.recompute:
        recompute_blocks(model)
    return model, facts, trainable


def step_batch(case: Case, step: int) -> dict[str, torch.Tensor]:
    """Eight pictures with two captions each, the later ones longer."""
    generator = torch.Generator().manual_seed(step % 4)
    size = (8, 5, 16) if case.features else (8, 3, 16, 16)
    content = torch.randn(size, generator=generator, dtype=torch.float64).to(getattr(torch, case.dtype))
    labels = torch.randint(2, TEXT["vocab_size"], (16, 9), generator=generator)
    for row, length in enumerate(torch.arange(16) // 2 + 1):
        labels[row, length - 1] = 1
        labels[row, length:] = -100
    return {"features" if case.features else "pixel_values": content, "labels": labels}


def part_of(batch: dict, rows: slice) -> dict:
    return {name: tensor[rows] if name != "labels" else tensor[rows.start * 2 : rows.stop * 2] for name, tensor in batch.items()}


def captions_of(model: Captioner, batch: dict, greedy) -> list[list[int]]:
    """Ids of greedy captions up to eos."""
    ids = greedy(model, model.read(batch["features"]) if "features" in batch else model.encode(batch["pixel_values"]))
    return [row[: row.index(1) + 1] if 1 in row else row for row in ids.tolist()]


def autocast(case: Case) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=case.bf16)


def alone(case: Case, folder: Path) -> dict:
    """The run of one process; its losses and captions. Files go to folder."""
    model, facts, trainable = build(case)
    step_loss = StepLoss(model, trainable.values(), CPU, 0.0, trains_vision=True)
    optimizer = make_optimizer(trainable, SETTINGS, CPU)
    losses = []
    for step in range(case.steps):
        batch = step_batch(case, step)
        with autocast(case):
            loss = step_loss(batch) / (batch["labels"] != -100).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trainable.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item(), norm.item()])
    save(model, facts, optimizer, trainable, folder)
    model.eval()
    with autocast(case), torch.no_grad():
        batch = part_of(step_batch(case, 0), slice(0, 7))
        ids = captions_of(model, batch, lambda model, memory: generate.greedy(model, memory, max_new_tokens=12))
    return {"losses": losses, "ids": ids}


def save(model: nn.Module, facts: dict, optimizer: torch.optim.Optimizer, trainable: dict, folder: Path) -> None:
    checkpoint.save_weights(model, Tokenizer(folder.parent.parent / "spiece.model"), facts, folder)
    checkpoint.save_optimizer(optimizer, {parameter: name for name, parameter in trainable.items()}, folder / "optimizer.safetensors")


class Shared:
    """One of the processes of a sharded training; values: whole parameters to start from, instead of those of `build`."""

    def __init__(self, case: Case, processes: Processes, values: dict | None = None):
        self.case, self.processes = case, processes
        self.model, self.facts, self.before = build(case)
        if values is not None:
            copy_values(self.model, values)
        self.step_loss = sharding.shard(StepLoss(self.model, (), CPU, 0.0, True), self.model, CPU, from_features=case.features)
        self.trainable = sharding.trained(self.model)
        self.optimizer = make_optimizer(self.trainable, SETTINGS, CPU)

    def train(self, first: int, last: int) -> list[list[float]]:
        """Loss per token and gradient norm of each step. Now and then the second process has nothing to do, or both have two micro-batches."""
        losses, rank = [], self.processes.rank
        for step in range(first, last):
            batch = step_batch(self.case, step)
            cuts = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)][rank::2] if step % 3 == 1 else [slice(4 * rank, 4 * rank + 4)]
            own = [part_of(batch, cut) for cut in cuts]
            if step % 5 == 2:
                own = [None] if rank else [batch]
            tokens, total = (batch["labels"] != -100).sum(), 0.0
            for micro_batch in own:
                with autocast(self.case):
                    loss = self.step_loss(micro_batch)
                (loss * 2 / tokens).backward()
                total += loss.item()
            norm = sharding.clip_gradients(self.trainable.values(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append([self.processes.sum([total])[0] / int(tokens), norm.item()])
        return losses

    def save(self, folder: Path) -> None:
        with sharding.gathered(self.step_loss, self.model, self.facts, self.optimizer):
            if self.processes.is_main:
                save(self.model, self.facts, self.optimizer, self.trainable, folder)
        self.processes.wait()

    def values(self) -> dict[str, torch.Tensor]:
        """All parameters, whole, in every process."""
        return {name: parameter.detach().full_tensor() for name, parameter in self.model.named_parameters()}

    def captions(self) -> list[list[int]]:
        """Ids of seven pictures: four of the first process, in two batches, three of the second, in one."""
        everything = step_batch(self.case, 0)
        batches = [[slice(0, 2), slice(2, 4)], [slice(4, 7), None]][self.processes.rank]
        self.model.eval()
        found = []
        for rows in batches:
            batch = self.step_loss.blank if rows is None else part_of(everything, rows)
            with autocast(self.case):
                ids = self.step_loss.run(captions_of, self.model, batch, lambda model, memory: sharding.greedy(model, memory, 12, self.processes))
            found += [] if rows is None else ids
        self.model.train()
        return [row for rows in self.processes.everyone(found) for row in rows]


def copy_values(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


def worker(folder: Path) -> None:
    """Train every case, save and go on from the files; what was found goes to CASE/rank-R.json."""
    processes, _ = start("cpu")
    for name, case in CASES.items():
        (folder / name / f"rank-{processes.rank}.json").write_text(json.dumps(follow(case, folder / name, processes)))
    processes.close()


def follow(case: Case, folder: Path, processes: Processes) -> dict:
    """One case in one of the processes."""
    shared = Shared(case, processes)
    found = {
        "held": sum(parameter.to_local().numel() for parameter in shared.model.parameters()),
        "all": sum(parameter.numel() for parameter in shared.model.parameters()),
        "left": sum(parameter.numel() for parameter in shared.before.values()),
        "losses": shared.train(0, case.steps // 2),
    }
    shared.save(folder / "half")
    shared = Shared(case, processes, shared.values())
    checkpoint.load_optimizer(shared.optimizer, shared.trainable, folder / "half" / "optimizer.safetensors")
    for parameter, moments in shared.optimizer.state.items():
        moments.update({key: sharding.distribute(moment, parameter) for key, moment in moments.items()})
    found["ids before"] = shared.captions()
    found["losses"] += shared.train(case.steps // 2, case.steps)
    found["ids"] = shared.captions()
    found["moments held"] = sum(moment.to_local().numel() for moments in shared.optimizer.state.values() for moment in moments.values() if moment.ndim)
    shared.save(folder / "end")
    values = shared.values()
    if processes.is_main:
        model, facts, trainable = build(case)
        copy_values(model, values)
        optimizer = make_optimizer(trainable, SETTINGS, CPU)
        checkpoint.load_optimizer(optimizer, trainable, folder / "end" / "optimizer.safetensors")
        save(model, facts, optimizer, trainable, folder / "again")
    return found


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """The same trainings by one process and by two."""
    folder, found = tmp_path_factory.mktemp("sharding"), {}
    train_tokenizer([f"a plain {colour} picture, everything here is {colour}" for colour in COLOURS], folder / "spiece.model", 64)
    for name, case in CASES.items():
        (folder / name).mkdir()
        found[name] = SimpleNamespace(folder=folder / name, case=case, one=alone(case, folder / name / "alone"))
    ended = launch(f"from pathlib import Path; from tests.test_sharding import worker; worker(Path({str(folder)!r}))", timeout=300)
    assert [process.returncode for process in ended] == [0, 0], "\n".join(process.stderr[-3000:] for process in ended)
    for name, run in found.items():
        run.two = [json.loads((folder / name / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return found


@pytest.fixture(params=CASES)
def runs(request, everything) -> SimpleNamespace:
    return everything[request.param]


def files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_processes_train_as_one(runs):
    tolerance = 0.02 if runs.case.bf16 else 1e-6
    expected = torch.tensor(runs.one["losses"], dtype=torch.float64)
    for found in runs.two:
        losses = torch.tensor(found["losses"], dtype=torch.float64)
        torch.testing.assert_close(losses[:, 0], expected[:, 0], rtol=0, atol=tolerance)
        torch.testing.assert_close(losses[:, 1], expected[:, 1], rtol=10 * tolerance, atol=0)  # the gradient's norm; RMSNorm rounds to fp32
    assert expected[-1, 0] < expected[0, 0] - 0.5  # there was something to learn
    ours, theirs = files(runs.folder / "end"), files(runs.folder / "alone")
    assert ours.keys() == theirs.keys() and any(name.endswith(".safetensors") for name in ours)
    for name in (name for name in ours if name.endswith(".safetensors")):
        mine, other = load_file(ours[name]), load_file(theirs[name])
        assert mine.keys() == other.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], other[key], rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")


def test_a_checkpoint_is_that_of_one_process_byte_for_byte(runs):
    gathered, plain = files(runs.folder / "end"), files(runs.folder / "again")
    assert gathered.keys() == plain.keys()
    for name in gathered:
        assert gathered[name].read_bytes() == plain[name].read_bytes(), name
    assert ("text/model.safetensors" in gathered) == bool(runs.case.whole)


@pytest.mark.parametrize("name", ["added", "whole"])
def test_captions_are_those_of_one_process(everything, name):
    run = everything[name]
    assert run.two[0]["ids"] == run.two[1]["ids"] == run.one["ids"] != run.two[0]["ids before"]
    assert len({len(ids) for ids in run.one["ids"]}) > 1, "all captions are of one length"


def test_each_process_holds_half_and_nothing_is_kept_beside_it(runs):
    for found in runs.two:
        assert 0.4 < found["held"] / found["all"] < 0.6 and found["left"] == 0
    assert sum(found["held"] for found in runs.two) == runs.two[0]["all"]
    moments = load_file(runs.folder / "end" / "optimizer.safetensors")
    assert sum(found["moments held"] for found in runs.two) == sum(moment.numel() for moment in moments.values() if moment.ndim)


def test_what_can_not_be_shared_out_is_named(monkeypatch):
    model, *_ = build(CASES["added"])
    model.vision.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match="vision.scale is a single number"):
        sharding.shard(nn.Module(), model, CPU)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    with pytest.raises(UserError, match=r"needs torch 2\.8 or later, not 2\.6\.0"):
        sharding.shard(nn.Module(), model, CPU)


def test_train_py_shards_and_a_resume_gives_the_same_bytes(tiny_data, tmp_path):
    def run(name: str, processes: int, *flags: str) -> Path:
        (tmp_path / name).mkdir()
        common = [*tiny_train_flags(tiny_data, tmp_path / name), "--batch-size", "3", "--eval-every", "2"]
        ended = launch(["train.py", *common, *flags], processes, timeout=120)
        assert [process.returncode for process in ended] == [0] * processes, ended[0].stderr[-2000:]
        return tmp_path / name / "run"

    one, two = run("one", 1, "--grad-accumulation", "2"), run("two", 2, "--shard")
    lines = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (one, two)]
    assert [(line["split"], line["step"]) for line in lines[0]] == [(line["split"], line["step"]) for line in lines[1]]
    for mine, other in zip(*lines, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
    undisturbed = {name: path.read_bytes() for name, path in files(two / "checkpoints" / "step-00000004").items()}
    metrics = (two / "metrics.jsonl").read_bytes()
    shutil.rmtree(two / "checkpoints" / "step-00000004")
    ended = launch(["train.py", "--resume", str(two)], 2, timeout=120)
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr[-2000:]
    assert {name: path.read_bytes() for name, path in files(two / "checkpoints" / "step-00000004").items()} == undisturbed
    assert (two / "metrics.jsonl").read_bytes() == metrics
