"""The cross-entropy without logits against float64 autograd and `F.cross_entropy`."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from captioner import cross_entropy
from captioner.cross_entropy import chunk_rows, head_cross_entropy, linear_cross_entropy
from captioner.errors import UserError
from captioner.model import Captioner
from captioner.t5 import T5, T5Config
from tests.conftest import REPOSITORY, TINY_TEXT

SMOOTHING = (0.0, 0.1)
# M, D, V
SIZES = ((1, 1, 1), (3, 5, 2), (7, 16, 33), (13, 8, 257))


def operands(M: int, D: int, V: int, dtype=torch.float32, device="cpu"):
    """hidden, weight that require gradients, and labels that include the first and the last word."""
    generator = torch.Generator().manual_seed(M + D + V)
    hidden, weight = (torch.randn(rows, D, generator=generator).to(device, dtype).requires_grad_() for rows in (M, V))
    labels = torch.randint(V, (M,), generator=generator)
    labels[:1], labels[-1:] = V - 1, 0
    return hidden, weight, labels.to(device)


def plain(hidden, weight, labels, smoothing):
    """What `linear_cross_entropy` must equal."""
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)


def results(function, hidden, weight, labels, smoothing, dtype=None):
    """Loss and both gradients of function on detached copies, in float64."""
    hidden, weight = (operand.detach().to(dtype or operand.dtype).requires_grad_() for operand in (hidden, weight))
    loss = function(hidden, weight, labels, smoothing)
    return [value.detach().double() for value in (loss, *torch.autograd.grad(loss, (hidden, weight)))]


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of four rows, worked on two and three at a time."""
    monkeypatch.setitem(cross_entropy.CHUNK_ROWS, "cpu", 4)
    monkeypatch.setattr(cross_entropy, "BLOCK_NUMBERS", 100)


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_float64_autograd(sizes, smoothing, dtype, small_chunks):
    case = (*operands(*sizes, dtype), smoothing)
    for value, exact, tolerance in zip(results(linear_cross_entropy, *case), results(plain, *case, torch.float64), (2e-7, 0, 0)):
        tolerance = max(tolerance, 2e-6 if dtype == torch.float32 else 1e-14)
        torch.testing.assert_close(value, exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize("M", [1, 3, 4, 5, 8, 9])
def test_chunk_boundaries(M, small_chunks):
    case = (*operands(M, 6, 33), 0.1)
    for value, exact in zip(results(linear_cross_entropy, *case), results(plain, *case, torch.float64)):
        assert relative_error(value, exact) < 2e-6


@pytest.mark.parametrize("limit", [4, 512, 1024])
@pytest.mark.parametrize("rows", [0, 1, 4, 5, 640, 1024, 1025, 2560])
def test_chunks_are_few_and_within_the_limit(rows, limit):
    size = chunk_rows(rows, limit)
    assert 1 <= size <= max(min(limit, rows), 1)
    assert -(-rows // size) == -(-rows // limit)


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("scale", [1e4, 1e15])
def test_extreme_logits_do_not_overflow(scale, smoothing):
    """The right word far above and far below the others."""
    weight = torch.eye(5).requires_grad_()
    hidden = (scale * torch.eye(5)[[1, 2]]).requires_grad_()
    case = (hidden, weight, torch.tensor([1, 3]), smoothing)
    for value, exact in zip(results(linear_cross_entropy, *case), results(plain, *case, torch.float64)):
        assert value.isfinite().all()
        torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("peaked", [1.0, 8.0])
def test_bf16_is_as_exact_as_torch(smoothing, peaked):
    """Logits flat and peaked at the right word, where probability minus one cancels; M of several chunks."""
    hidden, weight, labels = operands(600, 64, 500)
    with torch.no_grad():
        hidden.copy_(0.2 * hidden + peaked * weight[labels] / weight.shape[1])
    case = (hidden.detach().bfloat16(), weight.detach().bfloat16(), labels, smoothing)
    exact = results(plain, *case, torch.float64)
    for ours, theirs, truth in zip(results(linear_cross_entropy, *case), results(plain, *case), exact):
        assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth) + 1e-7


def test_autocast_computes_in_bf16_and_returns_gradients_in_fp32():
    hidden, weight, labels = operands(600, 64, 500)
    exact = results(plain, hidden, weight, labels, 0.0, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
        theirs = results(plain, hidden, weight, labels, 0.0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    for ours, their, truth in zip((loss, hidden.grad, weight.grad), theirs, exact):
        assert relative_error(ours.detach().double(), truth) <= 2 * relative_error(their, truth) + 1e-7
    assert relative_error(hidden.grad.double(), exact[1]) > 1e-5, "fp32 products would show that autocast is ignored"


def test_frozen_bf16_weight_under_autocast():
    """What training has: activations in fp32, the frozen head kept in bf16."""
    hidden, weight, labels = operands(9, 16, 33)
    weight = weight.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        gradients = [torch.autograd.grad(function(hidden, weight, labels, 0.0), hidden)[0] for function in (linear_cross_entropy, plain)]
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)


def test_two_dtypes_without_autocast_are_refused():
    hidden, weight, labels = operands(3, 4, 5)
    with pytest.raises(RuntimeError, match="dtype"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)


def test_no_tokens():
    hidden, weight, labels = operands(0, 4, 5)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.shape == (0, 4) and not weight.grad.any()


def test_incoming_gradient_scales_and_the_graph_can_be_kept():
    hidden, weight, labels = operands(9, 4, 5)
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels)
    for factor in (-3.0, 0.25):
        for gradient, expected in zip(torch.autograd.grad(loss * factor, (hidden, weight), retain_graph=True), once):
            torch.testing.assert_close(gradient, expected * factor)


def test_hidden_states_with_strides():
    hidden, weight, labels = operands(9, 4, 5)
    wide = torch.randn(4, 18)
    wide.t()[::2] = hidden.detach()
    strided = wide.t()[::2].detach().requires_grad_()
    for value, expected in zip(results(linear_cross_entropy, strided, weight, labels, 0.0), results(plain, hidden, weight, labels, 0.0)):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


class Recorder(TorchDispatchMode):
    """The largest tensor that any operation returned, and how many matrix products there were."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        self.products += "mm" in func.__name__
        return out


def test_the_logits_are_never_all_there(monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_ROWS, "cpu", 16)
    hidden, weight, labels = operands(160, 4, 50)
    largest = {}
    for function in (linear_cross_entropy, plain):
        with Recorder() as recorder:
            function(hidden, weight, labels, 0.1).backward()
        largest[function] = recorder.largest
    assert largest == {linear_cross_entropy: 16 * 50, plain: 160 * 50}


@pytest.mark.parametrize(("wanted", "products"), [("", 1), ("h", 2), ("w", 2), ("hw", 3)])
def test_only_gradients_that_are_asked_for_are_computed(wanted, products):
    hidden, weight, labels = operands(9, 4, 5)
    expected = linear_cross_entropy(hidden, weight, labels).item()
    hidden.requires_grad_("h" in wanted)
    weight.requires_grad_("w" in wanted)
    with Recorder() as recorder:
        loss = linear_cross_entropy(hidden, weight, labels)
    assert (loss.item(), loss.requires_grad, recorder.products) == (expected, bool(wanted), products)
    if wanted:
        loss.backward()
        assert [hidden.grad is not None, weight.grad is not None] == ["h" in wanted, "w" in wanted]


def test_no_grad_computes_the_loss_alone():
    hidden, weight, labels = operands(9, 4, 5)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Recorder() as recorder:
            loss = linear_cross_entropy(hidden, weight, labels)
        assert recorder.products == 1 and not loss.requires_grad
        torch.testing.assert_close(loss.item(), plain(hidden, weight, labels, 0.0).item())


@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_ignored_labels_do_not_count(smoothing, small_chunks):
    hidden, weight, labels = operands(13, 8, 257)
    labels[::3] = -100
    found = results(linear_cross_entropy, hidden, weight, labels, smoothing)
    for value, exact in zip(found, results(plain, hidden, weight, labels, smoothing, torch.float64)):
        assert relative_error(value, exact) < 2e-6
    assert not found[1][::3].any() and found[1][1::3].all()
    assert linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), smoothing) == 0


def test_labels_outside_the_vocabulary_are_refused():
    hidden, weight, _ = operands(2, 4, 5)
    for label in (-1, 5):
        with pytest.raises(UserError, match=f"label {label} is outside the vocabulary of 5"):
            linear_cross_entropy(hidden, weight, torch.tensor([1, label]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    hidden, weight, labels = operands(9, 4, 5)
    expected = results(linear_cross_entropy, hidden, weight, labels, 0.1)[1:]
    loss = checkpoint(lambda states: linear_cross_entropy(2 * states, weight, labels, 0.1), hidden / 2, use_reentrant=reentrant)
    loss.backward()
    for gradient, value in zip((hidden.grad, weight.grad), expected):
        torch.testing.assert_close(gradient.double(), value)


def test_under_torch_compile():
    hidden, weight, labels = operands(9, 4, 5)
    expected = results(linear_cross_entropy, hidden, weight, labels, 0.1)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for value, same in zip(results(compiled, hidden, weight, labels, 0.1), expected):
        torch.testing.assert_close(value, same)


class Wrapped(nn.Linear):
    """A head that is more than its matrix."""

    def forward(self, x):
        return super().forward(x) + 1.5 * x.sum(-1, keepdim=True) * torch.linspace(0, 1, self.out_features)


@pytest.mark.parametrize("head", [nn.Linear(4, 5, bias=False), nn.Linear(4, 5), Wrapped(4, 5, bias=False)], ids=["plain", "bias", "wrapped"])
def test_heads(head):
    hidden, _, labels = operands(9, 4, 5)
    loss = head_cross_entropy(head, hidden, labels, 0.1)
    expected = F.cross_entropy(head(hidden), labels, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, hidden)[0] for value in (loss, expected)))
    assert (loss.grad_fn.name() == "LinearCrossEntropyBackward") == (head.bias is None and type(head) is nn.Linear)


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("tied", [True, False])
def test_loss_of_the_model(tied, smoothing, small_chunks):
    torch.manual_seed(0)
    vision = nn.Identity()
    vision.width = 6
    model = Captioner(vision, T5(T5Config.from_dict(TINY_TEXT | {"tie_word_embeddings": tied}))).eval()
    memory = torch.randn(2, 5, TINY_TEXT["d_model"])
    labels = torch.randint(2, TINY_TEXT["vocab_size"], (6, 7))
    labels[1, 3:], labels[4] = -100, -100
    logits = model.decoder_logits(memory, labels)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    loss, count = model.loss(memory, labels, smoothing)
    assert count == 6 * 7 - 4 - 7
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    parameters = list(model.text.decoder.parameters()) + list({model.text.embedding.weight, model.text.lm_head.weight})
    for gradients in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


INTERPRETED = """
import json, sys
import torch
import torch.nn.functional as F
from captioner import triton_cross_entropy as kernel

torch.manual_seed(0)
errors = []
for columns, block in ((1, 64), (63, 64), (64, 64), (65, 64), (1000, 256)):
    for smoothing in (0.0, 0.1):
        for scale in (1.0, 1e4):
            kernel.BLOCK = block
            wide = torch.full((5, columns + 3), float("nan"))
            logits = wide[:, :columns]
            logits.copy_(scale * torch.randn(5, columns))
            labels = torch.randint(columns, (5,))
            labels[0], labels[1], labels[2] = columns - 1, 0, -100
            exact = logits.double().requires_grad_()
            truth = F.cross_entropy(exact, labels, reduction="none", label_smoothing=smoothing)
            truth.sum().backward()
            alone = kernel.row_losses(logits.clone(), labels, smoothing, False)
            losses = kernel.row_losses(logits, labels, smoothing, True)
            errors.append(((losses - truth).abs() / truth.abs().clamp(min=1)).max().item())
            errors.append((logits - exact.grad).abs().max().item())
            errors.append((alone - losses).abs().max().item())
            errors.append(float(not wide[:, columns:].isnan().all()))
            errors.append(float(losses.dtype != torch.float32))
unknown = kernel.row_losses(torch.randn(3, 9), torch.tensor([3, 9, -1]), 0.0, False).isnan().tolist()
empty = kernel.row_losses(torch.empty(0, 9), torch.empty(0, dtype=torch.long), 0.0, True).shape[0]
json.dump({"errors": errors, "unknown": unknown, "empty": empty}, sys.stdout)
"""


def test_kernel_in_the_interpreter():
    """In a process of its own: triton reads TRITON_INTERPRET when a kernel is defined."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["errors"]) == 100 and max(found["errors"]) < 1e-6
    assert found["unknown"] == [False, True, True] and found["empty"] == 0


COMPILED = """
import json, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from captioner import triton_cross_entropy as kernel

tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
types = {"labels_ptr": "*i64", "losses_ptr": "*fp32", "row_stride": "i32", "vocabulary": "i32", "label_smoothing": "fp32"}
constants = {"GRADIENT": True, "SMOOTH": True, "BLOCK": kernel.BLOCK}
found = {}
for architecture in (80, 90):
    for dtype in ("bf16", "fp32"):
        signature = {"logits_ptr": "*" + dtype} | types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel.row_losses_kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": kernel.NUM_WARPS})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        numbers = dict(word.split(":") for word in usage.split() if word.startswith(("REG:", "STACK:", "LOCAL:")))
        found[f"sm_{architecture} {dtype}"] = {name: int(number) for name, number in numbers.items()}
json.dump(found, sys.stdout)
"""


def test_kernel_compiles_for_gpus_without_spills(tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"sm_80 bf16", "sm_80 fp32", "sm_90 bf16", "sm_90 fp32"}
    for usage in found.values():
        # 128 registers of 256 threads let two programs share a multiprocessor.
        assert usage["STACK"] == usage["LOCAL"] == 0 and usage["REG"] <= 128, found


def test_without_triton_the_plain_form_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "captioner.triton_cross_entropy", None)
    cross_entropy.triton_row_losses.cache_clear()
    assert cross_entropy.triton_row_losses() is None
    cross_entropy.triton_row_losses.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(5, 16, 33), (130, 64, 32128), (2500, 64, 5000)])
def test_on_a_gpu(sizes, dtype, smoothing):
    """The kernel as used: error at most twice torch's own, the same bits twice, and captured in a CUDA graph."""
    hidden, weight, labels = operands(*sizes, dtype, "cuda")
    case = (hidden, weight, labels, smoothing)
    first, exact = results(linear_cross_entropy, *case), results(plain, *case, torch.float64)
    for ours, again, theirs, truth in zip(first, results(linear_cross_entropy, *case), results(plain, *case), exact):
        assert torch.equal(ours, again)
        assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth) + 1e-6
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.graph(graph):
        loss = linear_cross_entropy(*case)
    graph.replay()
    torch.testing.assert_close(loss.double(), first[0])
