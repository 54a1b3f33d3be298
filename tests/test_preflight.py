"""What is tried before the first step: the longest batch, gradients that are lost or should not be there, memory, and disks that cannot be written."""

import contextlib
import errno
import hashlib
import itertools
import os
import resource
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

import lora
from captioner import preflight
from captioner.errors import UserError
from captioner.files import save_tensors
from captioner.model import Captioner
from captioner.runtime import encode_images, recompute_blocks
from captioner.t5 import T5, T5Config, input_groups
from captioner.timm_vision import TimmVision
from captioner.vit import VisionConfig, VisionTransformer
from data.buckets import CaptionLengths
from data.collate import pad_labels
from data.bad_images import BadRow
from data.dataset import CaptionDataset, make_loader
from data.images import BadImage
from data.rows import Row
from tests.conftest import TINY_TEXT

CPU = torch.device("cpu")


# The longest batch


class Named:
    """An image that is read by its name; `bad...` cannot be."""

    def __init__(self, name):
        self.name = name

    def open(self, max_pixels):
        if self.name.startswith("bad"):
            raise BadImage(self.name, "unreadable", "not an image")
        return self.name

    def fingerprint(self):
        raise BadImage(self.name, "missing", "only a name")


def encode(texts):
    return [[2] * (len(text.split())) + [1] for text in texts]


def loaded(rows, captions_per_image, batch_size):
    """The worst batch of rows given as {name: tokens of its captions without eos}."""
    rows = [Row(id=name, image=Named(name), captions=[" ".join(["x"] * count) for count in counts]) for name, counts in rows.items()]
    order = preflight.longest_rows(CaptionLengths(rows, encode, 40), captions_per_image, batch_size)
    dataset = CaptionDataset(rows, lambda name: torch.full((3, 2, 2), float(len(name))))
    batches = make_loader(dataset, encode, batch_size, order, 0, "all", max_caption_tokens=40)
    return preflight.worst_batch(batches, captions_per_image, min(batch_size, len(rows)))


@pytest.mark.parametrize("captions_per_image", ["1", "all"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_no_batch_has_more_padded_tokens(captions_per_image, batch_size):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        counts = {str(k): torch.randint(1, 30, (int(torch.randint(1, 6, (), generator=generator)),), generator=generator).tolist() for k in range(5)}
        labels = loaded(counts, captions_per_image, batch_size)["labels"]
        picks = [[[count] for count in own] for own in counts.values()] if captions_per_image == "1" else [[own] for own in counts.values()]
        worst = 0
        for group in itertools.combinations(picks, batch_size):
            for batch in itertools.product(*group):
                worst = max(worst, pad_labels([[[2] * count + [1] for count in own] for own in batch], 40).numel())
        assert labels.numel() == worst


def test_bad_images_and_few_rows_leave_a_full_batch():
    rows = {"bad1": [30], "bad2": [29], "bad3": [28], "a": [5, 20], "bad4": [19], "b": [3, 4]}
    batch = loaded(rows, "1", 3)
    assert batch["labels"].shape == (3, 1, 21) and batch["pixel_values"].shape[0] == len(batch["ids"]) == len(batch["captions"]) == 3
    assert (batch["labels"][0] != -100).sum() == 21, "the longer caption of the image"
    assert loaded({"a": [5], "b": [7, 3]}, "all", 8)["labels"].shape == (2, 2, 8)
    assert loaded({"a": [50]}, "1", 8)["labels"].shape == (1, 1, 40), "cut where training cuts"
    with pytest.raises(UserError, match="no image of the training split can be read"):
        loaded({"bad1": [3], "bad2": [4]}, "1", 2)
    with pytest.raises(UserError, match="no image of the training split has a caption"):
        loaded({"bad1": [3], "a": [], "b": []}, "1", 2)
    assert isinstance(CaptionDataset([Row(id="x", image=Named("bad"), captions=["x"])], lambda image: image)[0], BadRow)


def test_most_captions_and_longest_caption_meet_in_one_batch():
    rows = {**{f"many{k}": [3] * 6 for k in range(3)}, **{f"long{k}": [30] for k in range(3)}}
    assert loaded(rows, "all", 2)["labels"].shape == (2, 6, 31)
    assert loaded({"bad": [3] * 7, **rows}, "all", 3)["labels"].shape == (3, 6, 31)


# Gradients


def tiny_model(vision=None, **text):
    torch.manual_seed(0)
    if vision is None:
        vision = VisionTransformer(VisionConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2))
    return Captioner(vision, T5(T5Config(**(TINY_TEXT | {"dropout_rate": 0.1} | text))))


def backward_of(model, trains_vision=True, autocast=False, width=6, smoothing=0.0):
    """backward(attempt) of a batch of three images, two captions each, as the Trainer does it."""
    generator = torch.Generator().manual_seed(1)
    batch = {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    labels = torch.randint(2, 60, (6, width), generator=generator)

    def backward(attempt):
        model.train()
        torch.manual_seed(attempt)
        lora.seed_dropout(model, 0, attempt)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, count = model.loss(encode_images(model, batch, CPU, trains_vision), labels, smoothing)
        (loss / count).backward()

    return backward


def fingerprint(model) -> str:
    """SHA-256 of every bit of parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check(model, trainable, backward=None, indifferent=()):
    """`check_gradients`, which must leave nothing behind."""
    before, state = fingerprint(model), torch.get_rng_state()
    try:
        preflight.check_gradients(model, trainable, backward or backward_of(model), indifferent)
    finally:
        assert fingerprint(model) == before and torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in model.parameters())


def everywhere(model, **options):
    """LoRA, adapters and a soft prompt in decoder and vision; all that is trained."""
    lora.apply_lora(model, where=("decoder", "vision"), rank=2, dropout=options.pop("lora_dropout", 0.1))
    lora.apply_adapters(model, where=("decoder", "vision"), **options)
    lora.apply_soft_prompt(model, lora.initial_prompt(model.text.embedding, length=2))
    return lora.set_trainable(model)


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("reduction", [4, 1000])
def test_adapters_of_every_style_pass(style, reduction):
    model = tiny_model()
    check(model, everywhere(model, style=style, reduction=reduction))


@pytest.mark.parametrize("style", ["pfeiffer", "parallel"])
def test_a_bottleneck_of_one_unit_that_is_off_for_the_batch_passes(style):
    """No gradient goes through ReLU below zero, and other batches may be above it."""
    model = tiny_model()
    trainable = everywhere(model, style=style, reduction=1000)
    with torch.no_grad():
        for name, parameter in trainable.items():
            if name.endswith("down.bias"):
                parameter.fill_(-100.0)
    check(model, trainable)


@pytest.mark.parametrize("name, shape, passes", [("k_proj", (4,), True), ("v_proj", (4,), False), ("table", (1, 4), True), ("table", (2, 4), False)])
def test_what_adds_one_number_to_the_scores_of_all_keys_passes(name, shape, passes):
    """softmax(x + c) = softmax(x), so that the true gradient of c is zero."""
    model = nn.Module()
    own = "relative_position_bias_table" if name == "table" else "bias"
    model.add_module(name, nn.Module())
    model.get_submodule(name).register_parameter(own, nn.Parameter(torch.ones(shape)))
    trainable = dict(model.named_parameters())
    with contextlib.nullcontext() if passes else pytest.raises(UserError, match=f"1 parameter trained with a gradient of zero everywhere: {name}"):
        check(model, trainable, lambda attempt: (0.0 * trainable[f"{name}.{own}"]).sum().backward())


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("text", [{}, {"feed_forward_proj": "relu", "tie_word_embeddings": False}, {"dropout_rate": 0.9}])
def test_everything_trained_passes(text, autocast, recomputed):
    model = tiny_model(**text)
    everywhere(model, lora_dropout=0.5)
    if recomputed:
        recompute_blocks(model)
    check(model, lora.set_trainable(model, ["vision", "bridge", "text"]), backward_of(model, autocast=autocast, smoothing=0.1))


def test_frozen_parts_shared_memory_and_an_instruction_pass():
    model = tiny_model(num_layers=2)
    lora.apply_lora(model, where=("decoder", "encoder"), rank=2)
    lora.apply_soft_prompt(model, lora.initial_prompt(model.text.embedding, length=1), ["encoder"])
    for stack in (model.text.encoder, model.text.decoder):
        lora.lay_out(group for block in stack.blocks for group in input_groups(block))
    for frozen in ([], ["bridge"], ["prompt"]):
        trainable = lora.set_trainable(model, frozen=frozen)
        check(model, trainable, backward_of(model, trains_vision=False), preflight.one_key_parameters(model, trainable, 6))
    whole = lora.set_trainable(model, ["bridge", "text"])
    check(model, whole, backward_of(model, trains_vision=False), preflight.one_key_parameters(model, whole, 6))


def test_a_stack_with_a_frozen_adapter_on_top_passes():
    model = tiny_model()
    lora.apply_adapters(model, name="caption")
    lora.apply_adapters(model, name="question")
    lora.set_stack(model, ["question", "caption"])
    check(model, lora.set_trainable(model, [], ["caption"]), backward_of(model, trains_vision=False))
    lora.set_stack(model, ["question"])
    with pytest.raises(UserError, match="trained but not reached by any gradient: text.decoder.*adapters.caption"):
        check(model, lora.set_trainable(model), backward_of(model, trains_vision=False))


def test_a_4_bit_base_passes():
    pytest.importorskip("bitsandbytes")
    model = tiny_model(d_model=64, d_ff=64)
    lora.quantize_base(model)
    check(model, everywhere(model))


def test_batch_norms_and_stochastic_depth_pass():
    pytest.importorskip("timm")
    model = tiny_model(TimmVision("resnet10t", image_size=64))
    for module in model.vision.modules():
        if hasattr(module, "drop_path") and module.drop_path is None:
            module.drop_path = HalfTheTime()
    trainable = lora.set_trainable(model, ["vision", "bridge"])

    def backward(attempt):
        model.train()
        torch.manual_seed(attempt)
        pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        model.loss(model.encode(pixels), torch.randint(2, 60, (2, 5), generator=torch.Generator().manual_seed(1)))[0].backward()

    check(model, trainable, backward)


class HalfTheTime(nn.Module):
    """Stochastic depth (arXiv 1603.09382) of a whole batch."""

    def forward(self, x):
        return x * (torch.rand(()) < 0.5)


@pytest.mark.parametrize("tokens, width", [(1, 6), (5, 1), (1, 1)])
def test_attention_over_one_key_passes(tokens, width):
    """A softmax over one key is 1 whatever query and key are."""
    model = tiny_model()

    class First(nn.Module):
        num_tokens = tokens

        def forward(self, x):
            return x[:, :tokens]

    model.vision = nn.Sequential(model.vision, First())
    model.vision.num_tokens = tokens
    lora.apply_lora(model, where=("decoder",), rank=2, dropout=0.0)
    trainable = lora.set_trainable(model, ["bridge", "text"])
    backward = backward_of(model, trains_vision=False, width=width)
    check(model, trainable, backward, preflight.one_key_parameters(model, trainable, width))
    with pytest.raises(UserError, match="zero everywhere: .*k_proj.lora_A"):
        check(model, trainable, backward)


def test_a_layer_that_is_never_called_is_named():
    model = tiny_model()
    trainable = everywhere(model)
    mlp = model.text.decoder.blocks[1].mlp
    mlp.forward = lambda x: mlp.wo.base(mlp.dropout(mlp.activate(mlp.wi_0(x), mlp.wi_1(x))))
    with pytest.raises(UserError) as raised:
        check(model, trainable)
    names = ["text.decoder.blocks.1.mlp.wo.lora_A", "text.decoder.blocks.1.mlp.wo.lora_B"]
    assert str(raised.value) == f"2 parameters trained but not reached by any gradient: {', '.join(names)}"


def test_a_layer_whose_output_is_thrown_away_is_named():
    """Computed together with its neighbours, it has a gradient, of zeros."""
    model = tiny_model(dropout_rate=0.0)
    trainable = everywhere(model, lora_dropout=0.0)
    attention = model.text.decoder.blocks[0].self_attn
    attend = attention.attend
    attention.attend = lambda queries, keys, values, bias: attend(queries, keys, values * 0.0, bias)
    with pytest.raises(UserError, match="zero everywhere: text.decoder.blocks.0.self_attn.q_proj.lora_A") as raised:
        check(model, trainable)
    assert "v_proj.lora_B" in str(raised.value) and "blocks.1" not in str(raised.value)


def test_a_detached_stream_is_noticed_with_the_number_of_parameters():
    model = tiny_model()
    trainable = everywhere(model)
    block = model.vision.blocks[1]
    forward = block.forward
    block.forward = lambda x: forward(x.detach())
    lost = [name for name in trainable if name.startswith("vision.blocks.0.")]
    with pytest.raises(UserError) as raised:
        check(model, trainable)
    assert str(raised.value) == f"{len(lost)} parameters trained but not reached by any gradient: {', '.join(lost[:8])}, ..."


def test_adapters_that_are_off_are_named():
    model = tiny_model()
    trainable = everywhere(model)
    lora.set_stack(model, ())
    with pytest.raises(UserError, match=r"parameters trained but not reached.*adapters\.caption"):
        check(model, trainable)


def test_checkpointing_that_loses_gradients_is_noticed():
    """The reentrant form gives none to blocks behind frozen embeddings."""
    model = tiny_model()
    trainable = everywhere(model)
    for block in model.vision.blocks:
        block.forward = lambda x, forward=block.forward: recompute(forward, x, use_reentrant=True)
    with pytest.warns(UserWarning, match="None of the inputs"), pytest.raises(UserError, match="not reached by any gradient: vision.blocks.0"):
        check(model, trainable)


def test_a_loss_that_nothing_leads_to():
    model = tiny_model()
    trainable = lora.set_trainable(model)
    model.bridge.requires_grad_(False)
    with pytest.raises(UserError, match="2 parameters trained but not reached by any gradient: bridge.weight, bridge.bias"):
        check(model, trainable, backward_of(model, trains_vision=False))


def test_a_frozen_parameter_with_a_gradient_is_named():
    model = tiny_model()
    trainable = everywhere(model)
    model.text.decoder.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match="^1 parameter frozen but given a gradient: text.decoder.norm.weight$"):
        check(model, trainable)


def test_a_gradient_that_is_not_finite_is_named_and_the_values_come_back():
    model = tiny_model()
    trainable = lora.set_trainable(model)
    with torch.no_grad():
        model.bridge.weight[0, 0], model.bridge.bias[:] = torch.nan, -0.0
    with pytest.raises(UserError, match="2 parameters with a gradient that is not finite: bridge.weight, bridge.bias"):
        check(model, trainable, backward_of(model, trains_vision=False))


def test_an_exception_leaves_nothing_behind():
    model = tiny_model()
    trainable = everywhere(model)

    def interrupted(attempt):
        backward_of(model)(attempt)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(model, trainable, interrupted)


@pytest.fixture
def process_group(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_gradients_that_several_processes_average(process_group):
    """DistributedDataParallel refuses to go on where a parameter was missed; the message is ours."""
    model = tiny_model()
    trainable = everywhere(model, style="pfeiffer", reduction=1000)
    labels = torch.randint(2, 60, (4, 6), generator=torch.Generator().manual_seed(1))

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixels):
            return self.model.loss(self.model.encode(pixels), labels)[0]

    wrapped = nn.parallel.DistributedDataParallel(Loss())
    model.train()
    for name, parameter in trainable.items():
        if name.endswith("down.bias"):
            parameter.data.fill_(-100.0)
    check(model, trainable, lambda attempt: wrapped(torch.ones(2, 3, 16, 16)).backward())
    residual = model.text.decoder.blocks[0].mlp_residual
    residual.stack = ()
    with pytest.raises(UserError, match="4 parameters trained but not reached by any gradient: text.decoder.blocks.0.mlp_residual.adapters.caption.down"):
        check(model, trainable, lambda attempt: wrapped(torch.ones(2, 3, 16, 16)).backward())


def test_parameters_that_fsdp_has_split(process_group):
    """On one process, where the parts are the whole."""
    from torch.distributed.fsdp import fully_shard

    model = tiny_model()
    trainable = everywhere(model)
    for block in model.text.decoder.blocks:
        fully_shard(block)
    split = {name: parameter for name, parameter in model.named_parameters() if name in trainable}
    assert any(hasattr(parameter, "full_tensor") for parameter in split.values())
    before = {name: preflight.local(parameter).clone() for name, parameter in model.named_parameters()}
    preflight.check_gradients(model, split, backward_of(model))
    assert all(torch.equal(preflight.local(parameter), before[name]) for name, parameter in model.named_parameters())
    moments = preflight.moments_like(split)
    assert all(moments[f"{name}/exp_avg"].shape == parameter.shape for name, parameter in split.items())
    lora.set_stack(model, ())
    with pytest.raises(UserError, match="adapters.caption"):
        preflight.check_gradients(model, split, backward_of(model))


# Memory


def test_memory_and_time_of_a_step():
    cost = preflight.measured(lambda: torch.ones(2**26).sum(), CPU, "8 images x 5 tokens", "")
    assert cost.seconds > 0 and (cost.bytes is None or cost.bytes > 2**28)
    what, size = "128 images x 40 tokens", int(3.4 * 2**30)
    assert preflight.describe_cost(what, preflight.Cost(size, None, 1.23)) == f"longest batch: {what}, 3.4 GiB, 1.2 s"
    assert preflight.describe_cost(what, preflight.Cost(size, 80 * 2**30, 1.23)) == f"longest batch: {what}, 3.4 GiB of 80.0 GiB, 1.2 s"
    assert preflight.describe_cost(what, preflight.Cost(None, None, 0.0)) == f"longest batch: {what}, 0.0 s"


@pytest.mark.parametrize("step", [lambda: torch.empty(2**60), lambda: bytearray(2**60)])
def test_too_little_memory_is_told_with_what_to_lower(step):
    advice = preflight.smaller_batches(128, 2, recomputes=False)
    with pytest.raises(UserError) as raised:
        preflight.measured(step, CPU, "128 images x 40 tokens", advice)
    message = str(raised.value)
    assert "128 images x 40 tokens, does not fit into the memory of cpu" in message and "\n" not in message
    assert "--batch-size 64 --grad-accumulation 4 or --gradient-checkpointing" in message
    assert preflight.smaller_batches(1, 1, True) == "a smaller --max-caption-tokens, --image-size or model"


def test_other_errors_of_a_step_are_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        preflight.measured(lambda: torch.ones(2, 3) @ torch.ones(2, 3), CPU, "", "")
    assert preflight.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


# The disk


def writer(directory: Path) -> None:
    """A checkpoint of 3 MiB in two files."""
    (directory / "adapter").mkdir()
    (directory / "adapter" / "config.json").write_text("{}")
    save_tensors(directory / "optimizer.safetensors", {"moment": torch.rand(3 * 2**18)})


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def refusal(run, write=writer, needed=3 * 2**20) -> str:
    """The message of a check that must fail, in one line, and leave nothing."""
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError) as raised:
        preflight.check_writing(run, write, needed=needed)
    assert "\n" not in str(raised.value) and sorted(run.rglob("*")) == before
    return str(raised.value)


def test_a_whole_checkpoint_is_written_read_and_removed(run):
    seen = []

    def read(directory):
        assert directory.parent == run / "checkpoints"
        seen.extend(sorted(path.name for path in directory.rglob("*") if path.is_file()))

    size = preflight.check_writing(run, writer, read)
    assert 3 * 2**20 < size < 3 * 2**20 + 2**12 and seen == ["config.json", "optimizer.safetensors"]
    assert not list(run.iterdir())
    (run / "checkpoints").mkdir()
    preflight.check_writing(run, writer)
    assert [path.name for path in run.rglob("*")] == ["checkpoints"]


def test_a_disk_that_gives_back_other_bytes(run, monkeypatch):
    def damage(path):
        if path.name == "optimizer.safetensors":
            with open(path, "r+b") as file:
                file.seek(1000)
                file.write(b"damaged")

    monkeypatch.setattr(preflight, "forget", damage)
    assert "gives back other bytes than were written (optimizer.safetensors)" in refusal(run)


def test_what_cannot_be_read_back(run):
    def read(directory):
        raise UserError("optimizer.safetensors: holds other moments") from FileNotFoundError(errno.ENOENT, "")

    with pytest.raises(UserError, match="^optimizer.safetensors: holds other moments$"):
        preflight.check_writing(run, writer, read)
    assert not list(run.iterdir())


@pytest.fixture
def mounted(tmp_path):
    """mounted(*options) is a directory with a small file system of its own; the test skips where mounting is not permitted."""
    folders = []

    def mount(*options: str) -> Path:
        folder = tmp_path / "mounted"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here ({done.stderr.strip()})")
        folders.append(folder)
        return folder

    try:
        yield mount
    finally:
        for folder in set(folders):
            subprocess.run(["umount", str(folder)], check=True)


def plain_writer(directory: Path) -> None:
    (directory / "weights").write_bytes(bytes(3 * 2**20))


@pytest.mark.parametrize("write", [writer, plain_writer])
def test_a_full_disk(mounted, write):
    folder = mounted("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    message = refusal(folder, write)
    assert str(folder / "checkpoints") in message and "the disk is full (3.0 MiB needed, 2.0 MiB free)" in message


def test_a_read_only_disk(mounted, run):
    mounted("--bind", str(run))
    folder = mounted("-o", "remount,bind,ro", str(run))
    assert "Read-only file system (3.0 MiB needed" in refusal(folder)


@pytest.mark.parametrize("write", [writer, plain_writer])
def test_files_above_the_size_that_is_allowed(run, write):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        message = refusal(run, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large (3.0 MiB needed, " in message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_disk_that_is_full_for_this_user(run, number, wrapped):
    def write(directory):
        (directory / "half").write_text("written")
        try:
            raise OSError(number, os.strerror(number), str(directory / "half"))
        except OSError as error:
            if not wrapped:
                raise
            raise UserError("half: cannot be written") from error

    assert "the disk is full (5.0 GiB needed, " in refusal(run, write, 5 * 2**30)


def test_no_permission_and_things_in_the_way(run):
    def forbidden(directory):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))

    assert "Permission denied (3.0 MiB needed, " in refusal(run, forbidden)
    assert "needed" not in refusal(run, forbidden, None)
    (run / "checkpoints").write_text("a file")
    assert f"{run / 'checkpoints'}: a checkpoint cannot be written: File exists" in refusal(run)


def test_permission_bits():
    """The superuser, whom they do not bind, becomes another for a moment."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            assert f"{folder / 'checkpoints'}: a checkpoint cannot be written: Permission denied (3.0 MiB needed, " in refusal(folder)
        finally:
            os.seteuid(user)
            folder.chmod(0o700)


def test_a_lost_directory(run, tmp_path):
    def lose(directory):
        for path in (directory, directory.parent, run):
            path.rmdir()
        writer(directory)

    assert "No such file or directory" in refusal(run, lose)
    assert not run.exists() and "No such file or directory" in refusal(run) and not run.exists()


def test_moments_are_those_of_adamw():
    model = tiny_model()
    trainable = lora.set_trainable(model)
    optimizer = torch.optim.AdamW(trainable.values(), fused=True)
    backward_of(model, trains_vision=False)(0)
    optimizer.step()
    state = torch.get_rng_state()
    made = preflight.moments_like(trainable)
    assert torch.equal(torch.get_rng_state(), state)
    real = {f"{name}/{key}": value for name, parameter in trainable.items() for key, value in optimizer.state[parameter].items()}
    assert {name: (value.shape, value.dtype) for name, value in made.items()} == {name: (value.shape, value.dtype) for name, value in real.items()}
    assert all(value.any() for name, value in made.items() if not name.endswith("step"))
    numbers = sum(parameter.numel() for parameter in model.bridge.parameters())
    assert preflight.checkpoint_bytes(model, trainable, []) == 12 * numbers
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert preflight.checkpoint_bytes(model, trainable, ["vision", "text"]) == 4 * everything + 8 * numbers


def test_bytes_as_people_write_them(tmp_path):
    assert [preflight.in_units(count) for count in (0, 1023, 1024, 3 * 2**30 + 2**29, 2**45)] == ["0 bytes", "1023 bytes", "1.0 KiB", "3.5 GiB", "32.0 TiB"]
    assert preflight.free_bytes(tmp_path / "not" / "there") > 0
    told = preflight.needed_and_free(tmp_path / "step-00000400", 2**31)
    assert told.startswith("2.0 GiB needed, ") and told.endswith("B free") and preflight.needed_and_free(tmp_path, None).count(",") == 0
