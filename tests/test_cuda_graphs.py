"""Steps replayed from CUDA graphs. On a CPU: which inputs get a graph, what is copied where, and that a step waits for nothing; on a GPU: equal to the same
steps without graphs, bit for bit.
"""

import functools
import itertools
import json

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import lora
import train
from captioner.cuda_graphs import MOST_GRAPHS, WARM_UPS, FullBatches, Recorder, StepGraphs, shape_key
from captioner.errors import UserError
from captioner.model import Captioner
from captioner.t5 import T5, T5Config
from captioner.trainer import Trainer
from data.buckets import bucket_edges

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def micro_batch(images=4, width=8, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, 90, (images, width), generator=generator)
    labels[:, width - 2 :] = labels[:, width - 2 :].masked_fill(torch.rand(images, 2, generator=generator) < 0.5, -100)
    return {"features": torch.randn(images, 5, 6, generator=generator), "labels": labels}


class ReplayedOnCpu:
    """A recorder whose graphs are the function itself; like a graph, it reads the buffers that it was recorded with and writes the same results."""

    device = torch.device("cpu")

    def __init__(self):
        self.runs = self.records = self.replays = 0

    def run(self, function):
        self.runs += 1
        return function()

    def record(self, function):
        self.records += 1
        results = (torch.full((1,), torch.nan), torch.tensor(torch.nan))

        def replay():
            self.replays += 1
            for buffer, value in zip(results, function(), strict=True):
                buffer.copy_(value)

        return replay, results


def training_step():
    """A small model and its step of AdamW."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 6))
    optimizer = torch.optim.AdamW([weight], lr=0.01)

    def step(inputs):
        losses = [((micro["features"] @ weight).mean(1) - micro["labels"].clamp(min=0).float().mean(1)).square().mean() for micro in inputs]
        loss = sum(losses)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    return weight, step


def test_a_key_tells_shapes_names_and_dtypes_apart():
    micro = micro_batch()
    key = shape_key([micro])
    assert key == shape_key([micro_batch(seed=5)]) == shape_key([dict(reversed(micro.items()))]) and hash(key) is not None
    others = [
        [micro, micro], [micro_batch(images=3)], [micro_batch(width=12)], [{"pixel_values": micro["features"], "labels": micro["labels"]}],
        [micro | {"features": micro["features"].bfloat16()}], [micro | {"features": micro["features"][:, :4]}],
    ]  # fmt: skip
    assert len({key, *map(shape_key, others)}) == 1 + len(others)


def test_full_batches_are_regular():
    regular = FullBatches(4, (8, 12))
    assert regular([micro_batch()]) and regular([micro_batch(width=12)])
    assert not regular([micro_batch(images=3)]) and not regular([micro_batch(width=9)]) and not regular([micro_batch()] * 2)
    pixels = {"pixel_values": torch.zeros(4, 3, 8, 8), "labels": torch.zeros(20, 8)}
    assert regular([pixels]), "five captions an image"


def test_replayed_steps_are_the_plain_steps():
    batches = [[micro_batch(4, (8, 12)[k % 2], k)] for k in range(20)] + [[micro_batch(3, 8, 50)], [micro_batch(4, 9, 51)], [micro_batch(4, 8, 52)]]
    weight, step = training_step()
    expected = [tuple(map(float, step(batch))) for batch in batches]
    recorder = ReplayedOnCpu()
    other_weight, other_step = training_step()
    graphs = StepGraphs(other_step, recorder, FullBatches(4, (8, 12)))
    assert [tuple(map(float, graphs(batch))) for batch in batches] == expected
    assert torch.equal(weight, other_weight)
    assert recorder.runs == 2 * WARM_UPS and recorder.records == 2 and recorder.replays == 21 - 2 * WARM_UPS


def test_a_graph_reads_its_own_buffers():
    read = []

    def step(inputs):
        read.append(inputs[0]["labels"].data_ptr())
        return inputs[0]["labels"].float().sum(), inputs[0]["features"].sum()

    graphs = StepGraphs(step, ReplayedOnCpu(), FullBatches(4, (8,)))
    for k in range(WARM_UPS + 4):
        batch = micro_batch(seed=k)
        wanted = float(batch["labels"].float().sum()), float(batch["features"].sum())
        assert tuple(map(float, graphs([batch]))) == wanted
        assert (read[-1] == batch["labels"].data_ptr()) == (k < WARM_UPS)
    assert len(set(read[WARM_UPS:])) == 1


def test_the_number_of_graphs_is_bounded():
    recorder = ReplayedOnCpu()
    _, step = training_step()
    graphs = StepGraphs(step, recorder, lambda inputs: True, most=2)
    for _, width in itertools.product(range(WARM_UPS + 2), (8, 9, 10)):
        graphs([micro_batch(width=width)])
    assert recorder.records == len(graphs.recorded) == 2
    assert len(bucket_edges(64)) < MOST_GRAPHS


def test_only_cuda_has_graphs(tiny_flags):
    with pytest.raises(UserError, match="CUDA graphs need a CUDA device, not cpu"):
        Recorder(torch.device("cpu"))
    with pytest.raises(UserError, match="--cuda-graphs needs a CUDA device, not cpu"):
        train.main([*tiny_flags, "--cuda-graphs"])


@pytest.mark.parametrize("flags", [["--gradient-checkpointing"], ["--grad-accumulation", "2"]])
def test_what_graphs_exclude(tiny_flags, flags):
    with pytest.raises(UserError, match=f"--cuda-graphs and {flags[0]} exclude each other"):
        train.main([*tiny_flags, "--cuda-graphs", *flags])


def make_trainer(folder, device: torch.device, precision: str, **settings) -> Trainer:
    """A trainer of bridge and LoRA in a decoder of two layers, with dropout everywhere; its pictures are features (B, 5, 6)."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=0, num_decoder_layers=2, num_heads=4, dropout_rate=0.1)
    vision = torch.nn.Identity()
    vision.width = 6
    with device:
        model = Captioner(vision, T5(config))
        lora.apply_lora(model, rank=4, dropout=0.1)
    trainable = lora.set_trainable(model, ("bridge",))
    wanted = train.Settings(batch_size=4, lr=1e-2, max_caption_tokens=16, **settings)
    return Trainer(wanted, folder, model, None, trainable, {}, device, precision, None, [], functools.partial(lora.seed_dropout, model))


def steps_of(trainer: Trainer, number: int, images: int = 4) -> list[tuple[float, float]]:
    """Losses and norms of steps whose captions are 8 or 12 wide, the last one with an image less."""
    batches = [micro_batch(images - (k == number - 1), (8, 12)[k % 3 == 0], seed=k) for k in range(number)]
    return [trainer.train_step([loaded(batch)], 1e-2 / (1 + k)) for k, batch in enumerate(batches)]


def loaded(batch: dict) -> dict:
    """As it comes from the loader, one caption an image: labels (B, 1, T)."""
    return batch | {"labels": batch["labels"][:, None], "batch_index": 0}


def test_a_trainer_with_graphs_is_the_trainer(tmp_path, monkeypatch):
    """On a CPU with the stand-in: the step reads no more than its inputs and what is set before it."""
    recorders = []

    def recorder(device):
        recorders.append(ReplayedOnCpu())
        return recorders[-1]

    monkeypatch.setattr("captioner.trainer.Recorder", recorder)
    plain = make_trainer(tmp_path, torch.device("cpu"), "fp32")
    graphed = make_trainer(tmp_path, torch.device("cpu"), "fp32", cuda_graphs=True)
    assert steps_of(plain, 12) == steps_of(graphed, 12)
    assert recorders[0].records == 2 and recorders[0].replays == 11 - 2 * WARM_UPS
    for name, parameter in plain.trainable.items():
        assert torch.equal(parameter, graphed.trainable[name]), name


def test_the_step_asks_the_device_for_no_value(tmp_path, monkeypatch):
    """Without a GPU: fake CUDA tensors, which refuse `.item()`, `nonzero` and choices of rows by a mask.

    PyTorch's autograd engine needs a GPU for them, so gradients are put there.
    """

    def set_gradients(loss):
        for parameter in trainer.trainable.values():
            parameter.grad = torch.ones_like(parameter)

    monkeypatch.setattr("captioner.trainer.make_optimizer", lambda trainable, *_: torch.optim.AdamW(trainable.values(), fused=True, capturable=True))
    monkeypatch.setattr("captioner.cross_entropy.triton_row_losses", lambda: None)
    monkeypatch.setattr("lora.functional.triton_lora.available", lambda x: "no GPU to launch on")
    monkeypatch.setattr(torch.Tensor, "backward", set_gradients)
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = make_trainer(tmp_path, torch.device("cuda"), "fp32", label_smoothing=0.1)
        trainer.set_training(True)
        trainer.seed_micro_batch(0)
        inputs = [{name: tensor.to("cuda") for name, tensor in micro_batch().items()}]
        loss, norm = trainer.update_weights(inputs)
        assert loss.shape == (1,) and norm.shape == () and loss.device.type == norm.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            loss.item()
        with pytest.raises(DynamicOutputShapeException):
            inputs[0]["features"][inputs[0]["features"] > 0]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphed_training_is_eager_training_bit_for_bit(tmp_path, precision):
    device = torch.device("cuda")
    eager = make_trainer(tmp_path, device, precision)
    graphed = make_trainer(tmp_path, device, precision, cuda_graphs=True)
    # The attention of the other backends adds in an order of its own in every run.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert steps_of(eager, 20) == steps_of(graphed, 20)
    assert len(graphed.update.recorded) == 2
    for name, parameter in eager.trainable.items():
        assert torch.equal(parameter, graphed.trainable[name]), name
        for moment, tensor in eager.optimizer.state[parameter].items():
            assert torch.equal(tensor, graphed.optimizer.state[graphed.trainable[name]][moment]), (name, moment)


@pytest.mark.gpu
@needs_cuda
def test_dropout_and_learning_rate_change_from_replay_to_replay(tmp_path):
    trainer = make_trainer(tmp_path, torch.device("cuda"), "fp32", cuda_graphs=True)
    batch = loaded(micro_batch())
    losses = [trainer.train_step([batch], 0.0)[0] for _ in range(WARM_UPS + 6)]
    assert len(set(losses[WARM_UPS:])) == 6, "the weights stay and the masks do not"
    before = {name: parameter.clone() for name, parameter in trainer.trainable.items()}
    trainer.train_step([batch], 0.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.trainable.items())
    trainer.train_step([batch], 1e-2)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in trainer.trainable.items())


@pytest.mark.gpu
@needs_cuda
def test_a_loss_that_is_not_finite_is_told_after_a_replay(tmp_path):
    trainer = make_trainer(tmp_path, torch.device("cuda"), "fp32", cuda_graphs=True)
    batch = loaded(micro_batch())
    for _ in range(WARM_UPS + 2):
        trainer.train_step([batch], 1e-3)
    with pytest.raises(UserError, match=f"non-finite loss at step {WARM_UPS + 3}"):
        trainer.train_step([batch | {"features": batch["features"] * torch.nan}], 1e-3)


@pytest.mark.gpu
@needs_cuda
def test_the_command_with_graphs_and_features_on_the_device(tiny_flags, tmp_path, capsys):
    """The captions are padded further than without graphs, so that sums differ in their last bits."""
    flags = [*tiny_flags, "--device", "cuda", "--train-base", "text", "--cache-features", str(tmp_path / "features")]
    flags += ["--max-steps", "24", "--log-every", "1"]
    losses = {}
    for name, more in (("eager", ["--no-features-on-device"]), ("graphed", ["--cuda-graphs"])):
        assert train.main([*flags, *more, "--output", str(tmp_path / name)]) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if line["split"] == "train"]
        assert ("kept in the memory of cuda" in capsys.readouterr().err) == (name == "graphed")
    assert len(losses["eager"]) == 24 and losses["graphed"] == pytest.approx(losses["eager"], rel=1e-3)


@pytest.mark.gpu
@needs_cuda
def test_a_step_that_waits_for_the_device_is_refused(tmp_path):
    def step(inputs):
        return inputs[0]["features"].sum() * inputs[0]["labels"].sum().item(), inputs[0]["labels"].sum()

    graphs = StepGraphs(step, Recorder(torch.device("cuda")), lambda inputs: True)
    batch = {name: tensor.cuda() for name, tensor in micro_batch().items()}
    for _ in range(WARM_UPS):
        graphs([batch])
    with pytest.raises(UserError, match="CUDA graphs can not record this training step"):
        graphs([batch])
