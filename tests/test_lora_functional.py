"""The LoRA linear in all forms that run on a CPU against the plain formula and autograd, with masks from `lora.masks`. Triton: test_triton_lora.py."""

import math

import pytest
import torch
import torch.nn.functional as F

import lora
from lora import cpu, functional
from lora.functional import Adapter, lay_out, lora_linear, lora_linears, lora_projections, room_of
from lora.masks import adapter_key, keep_fields, keep_probability, stream_state

FORMS = ("library", "C")  # of the dropped projection inside the fused form


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    if request.param == "library":
        monkeypatch.setattr(cpu, "unavailable", lambda: "switched off by the test")
    elif reason := cpu.unavailable():
        pytest.skip(reason)
    return request.param


def state(step: int = 2) -> torch.Tensor:
    return torch.tensor([stream_state(1, step)])


def problem(sizes=(40, 16, 8), rows=(33,), inputs=33, rank=8, dtype=torch.float32, bias=True):
    """x, weights, biases, adapters, and a gradient for each output."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = random(*rows, inputs).requires_grad_()
    weights = [torch.nn.Parameter(random(size, inputs) / math.sqrt(inputs), requires_grad=False) for size in sizes]
    biases = [random(size) if bias and index % 2 == 0 else None for index, size in enumerate(sizes)]
    wide = torch.promote_types(dtype, torch.float32)
    adapters = [
        Adapter(random(rank, inputs).to(wide).requires_grad_(), random(size, rank).to(wide).requires_grad_(), 0.7 + index, index + 3)
        for index, size in enumerate(sizes)
    ]
    return x, weights, biases, adapters, [random(*rows, size) for size in sizes]


def expected(x, weights, biases, adapters, dys, rate, state):
    """Outputs and gradients of the formula in float64, by autograd."""
    leaf = x.detach().double().requires_grad_()
    doubles = [Adapter(A.detach().double().requires_grad_(), B.detach().double().requires_grad_(), *rest) for A, B, *rest in adapters]
    outputs = []
    for weight, bias, adapter in zip(weights, biases, doubles):
        kept = torch.ones_like(leaf)
        if rate:
            kept = (keep_fields(adapter_key(state, adapter.stream), 0, leaf[..., 0].numel(), leaf.shape[-1], rate) < 0).double().view(leaf.shape)
        update = (kept * leaf / keep_probability(rate)) @ adapter.A.T @ adapter.B.T
        outputs.append(F.linear(leaf, weight.double(), None if bias is None else bias.double()) + adapter.scaling * update)
    torch.autograd.backward(outputs, [dy.double() for dy in dys])
    return [*outputs, leaf.grad, *(adapter.A.grad for adapter in doubles), *(adapter.B.grad for adapter in doubles)]


def found(x, weights, biases, adapters, dys, rate, state, **options):
    outputs = lora_linears(x, weights, biases, adapters, rate, state, **options)
    torch.autograd.backward(outputs, dys)
    return [*outputs, x.grad, *(adapter.A.grad for adapter in adapters), *(adapter.B.grad for adapter in adapters)]


def assert_near(results, references, tolerance):
    for result, reference in zip(results, references, strict=True):
        assert result.shape == reference.shape
        scale = reference.abs().max().item() if reference.numel() else 0
        assert (result.double() - reference).abs().max().item() <= tolerance * scale if reference.numel() else True


@pytest.mark.parametrize("room", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("sizes, rows, inputs, rank", [
    ((40,), (7,), 24, 3), ((40, 16, 8), (3, 11), 33, 8), ((64, 64), (700,), 768, 8), ((5, 3), (1,), 1, 1), ((12,), (4, 5), 65, 64), ((9, 9), (2,), 130, 16),
])  # fmt: skip
def test_outputs_and_gradients_are_those_of_the_formula(form, room, dtype, tolerance, rate, sizes, rows, inputs, rank):
    arguments = problem(sizes, rows, inputs, rank, dtype)
    references = expected(*arguments, rate, state())
    if room:
        lay_out(arguments[1], len(sizes) * rank)
        assert room_of(arguments[1], len(sizes) * rank) is not None
    results = found(*arguments, rate, state(), implementation="fused")
    assert_near(results, references, tolerance)
    assert all(adapter.A.grad.dtype == adapter.A.dtype and adapter.B.grad.dtype == adapter.B.dtype for adapter in arguments[3])


def test_the_reference_is_the_formula():
    arguments = problem(dtype=torch.float64)
    references = expected(*arguments, 0.1, state())
    assert_near(found(*arguments, 0.1, state(), implementation="reference"), references, 1e-12)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(form, monkeypatch, threads):
    monkeypatch.setattr(cpu, "SMALL", 0)
    arguments = problem((24, 24), (50,), 96)
    references = expected(*arguments, 0.2, state())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_near(found(*arguments, 0.2, state(), implementation="fused"), references, 1e-5)
    finally:
        torch.set_num_threads(before)


def test_no_rows(form):
    arguments = problem(rows=(0, 4))
    assert [tuple(y.shape) for y in found(*arguments, 0.1, state())[:3]] == [(0, 4, 40), (0, 4, 16), (0, 4, 8)]
    assert all(not adapter.A.grad.any() and not adapter.B.grad.any() for adapter in arguments[3])


def test_non_contiguous_input_and_gradient(form):
    x, weights, biases, adapters, _ = problem((20,), (3, 5), 12)
    wide = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    dy = torch.randn(20, 5, 3, generator=torch.Generator().manual_seed(4)).permute(2, 1, 0)
    references = expected(wide.permute(2, 1, 0), weights, biases, adapters, [dy], 0.1, state())
    y = lora_linear(wide.permute(2, 1, 0), weights[0], biases[0], adapters[0], 0.1, state())
    y.backward(dy)
    assert_near([y, wide.grad.permute(2, 1, 0), adapters[0].A.grad, adapters[0].B.grad], references, 1e-5)


def test_a_trained_base_gets_its_gradient_and_no_room():
    x, weights, biases, adapters, dys = problem((20, 8), dtype=torch.float64)
    lay_out(weights, 16)
    for tensor in (*weights, biases[0]):
        tensor.requires_grad_(True)

    def function(x, W0, W1, b0, A0, B0):
        first = Adapter(A0, B0, *adapters[0][2:])
        return tuple(lora_linears(x, [W0, W1], [b0, None], [first, adapters[1]], 0.3, state(), "fused"))

    assert torch.autograd.gradcheck(function, (x, *weights, biases[0], adapters[0].A, adapters[0].B))


def test_an_input_without_gradient_gets_none_and_the_adapters_still_do(form):
    x, weights, biases, adapters, dys = problem()
    references = expected(x, weights, biases, adapters, dys, 0.1, state())
    outputs = lora_linears(x.detach(), weights, biases, adapters, 0.1, state())
    torch.autograd.backward(outputs, dys)
    assert x.grad is None and all(weight.grad is None for weight in weights)
    assert_near([adapters[0].A.grad, adapters[2].B.grad], [references[4], references[9]], 1e-5)


def test_layers_of_a_group_computed_alone_leave_its_room_alone():
    x, weights, biases, adapters, dys = problem(bias=False)
    lay_out(weights, 24)
    together = lora_linears(x, weights, biases, adapters)
    alone = [lora_linear(x, *one) for one in zip(weights, biases, adapters)]
    again = lora_linears(x, weights, biases, adapters)
    assert all(torch.equal(a, b) for a, b in zip(together, again))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(together, alone))


def test_another_pass_or_another_rank_before_the_backward_pass_does_no_harm():
    x, weights, biases, adapters, dys = problem((40, 16), bias=False)
    others = problem((40, 16), bias=False, rank=3)[3]
    references = expected(x, weights, biases, adapters, dys, 0.1, state())
    lay_out(weights, 16)
    outputs = lora_linears(x, weights, biases, adapters, 0.1, state())
    with torch.no_grad():
        lora_linears(x, weights, biases, adapters)
    other = lora_linears(x, weights, biases, others)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(other, lora_linears(x, weights, biases, others, implementation="reference")))
    torch.autograd.backward(outputs, dys)
    assert_near([x.grad, *(a.A.grad for a in adapters), *(a.B.grad for a in adapters)], references[2:], 1e-5)


def test_saved_tensors_that_are_copies_give_the_same_gradients():
    arguments = problem((40, 16), bias=False)
    references = expected(*arguments, 0.1, state())
    lay_out(arguments[1], 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        assert_near(found(*arguments, 0.1, state()), references, 1e-5)


def test_memory_that_is_nobodys_room_is_left_alone():
    x, _, biases, adapters, _ = problem((8,), bias=False, inputs=64)
    wide = torch.randn(8, 128)
    weight = torch.nn.Parameter(wide[:, :64], requires_grad=False)
    before = wide.clone()
    lora_linears(x, [weight], biases, adapters)
    assert torch.equal(wide, before)


def test_an_output_may_be_changed_in_place():
    x, weights, biases, adapters, _ = problem((8,))
    lay_out(weights, 8)
    lora_linear(x, weights[0], biases[0], adapters[0]).relu_().sum().backward()


def test_default_dtypes_of_the_caller_do_not_matter(form):
    arguments = problem()
    references = expected(*arguments, 0.1, state())
    torch.set_default_dtype(torch.float64)
    try:
        assert_near(found(*arguments, 0.1, state()), references, 1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_very_wide_inputs(form):
    arguments = problem((4,), (3,), 40_000, rank=2)
    references = expected(*arguments, 0.1, state())
    assert_near(found(*arguments, 0.1, state()), references, 1e-5)


def test_laying_out_changes_no_value():
    weights = problem()[1]
    before = [weight.detach().clone() for weight in weights]
    lay_out(weights, 24)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before))


def test_projections_are_the_part_before_B(form):
    x, weights, biases, adapters, _ = problem((8, 8), dtype=torch.float32)
    Zs = lora_projections(x, adapters, 0.1, state())
    update = sum((Z @ adapter.B.T).square().sum() for Z, adapter in zip(Zs, adapters))
    update.backward()
    gradients = [x.grad, adapters[0].A.grad]
    x.grad = adapters[0].A.grad = None
    zero = [torch.zeros_like(weight) for weight in weights]
    sum(y.square().sum() for y in lora_linears(x, zero, [None, None], adapters, 0.1, state(), "reference")).backward()
    assert_near(gradients, [x.grad.double(), adapters[0].A.grad.double()], 1e-5)


def test_dropout_acts_where_there_is_a_state():
    x, weights, biases, adapters, _ = problem()
    plain = lora_linears(x, weights, biases, adapters, 0.0, state())
    assert all(torch.equal(a, b) for a, b in zip(lora_linears(x, weights, biases, adapters, 0.5, None), plain))
    assert not torch.equal(lora_linears(x, weights, biases, adapters, 0.5, state())[0], plain[0])
    assert not torch.equal(lora_linears(x, weights, biases, adapters, 0.5, state(3))[0], lora_linears(x, weights, biases, adapters, 0.5, state())[0])


def test_not_a_number_is_not_hidden(form):
    x, weights, biases, adapters, _ = problem((4,), (2,), 8)
    with torch.no_grad():
        x[1, 3] = math.nan
        adapters[0].A[0, 0] = math.inf
    y = lora_linear(x, weights[0], None, adapters[0])
    assert y[1].isnan().all() and not y[0].isfinite().any()


def test_autocast_casts_and_gradients_come_back_wide(form):
    arguments = problem((64, 32), (50,), 64)
    references = expected(*arguments, 0.1, state())
    x, weights, biases, adapters, dys = arguments
    with torch.autocast("cpu", torch.bfloat16):
        outputs = lora_linears(x, weights, biases, adapters, 0.1, state())
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    torch.autograd.backward(outputs, [dy.bfloat16() for dy in dys])
    assert adapters[0].A.grad.dtype == x.grad.dtype == torch.float32
    assert_near([*outputs, x.grad, *(a.A.grad for a in adapters), *(a.B.grad for a in adapters)], references, 3e-2)


# ---- which one is used -----------------------------------------------------------------------------------


@pytest.fixture
def kernel():
    yield lora.use_kernel
    lora.use_kernel("auto")


def chosen(x=None, weights=None, biases=None, adapters=None):
    arguments = problem((4,), (2,), 8)
    return functional.choose(x or arguments[0], weights or arguments[1], biases or arguments[2], adapters or arguments[3], 0.1)


def test_on_a_cpu_the_fused_form_is_used_and_it_is_said_why(kernel, monkeypatch):
    name, config, reason = chosen()
    assert (name, config) == ("fused", "") and reason.startswith("CPU")
    monkeypatch.setattr(cpu, "unavailable", lambda: "there is no C compiler (cc, gcc or clang)")
    assert "no C compiler" in chosen()[2]
    kernel("reference")
    assert chosen()[0] == "reference"


def test_a_kernel_that_can_not_be_had_is_an_error(kernel, monkeypatch):
    kernel("triton")
    monkeypatch.setattr(functional.triton_lora, "available", lambda x: "no triton here")
    with pytest.raises(ValueError, match="--lora-kernel triton: no triton here"):
        chosen()
    with pytest.raises(ValueError, match="unknown LoRA kernel 'fast': one of auto, triton, reference"):
        kernel("fast")


def test_ranks_beyond_the_kernels_are_an_error(kernel, monkeypatch):
    kernel("triton")
    monkeypatch.setattr(functional.triton_lora, "available", lambda x: None)
    x, weights, biases, adapters, _ = problem((4,), (2,), 80, rank=65)
    with pytest.raises(ValueError, match="--lora-kernel triton: rank 65 is above 64"):
        functional.choose(x, weights, biases, adapters, 0.1)


# ---- the C form ------------------------------------------------------------------------------------------


def test_without_a_compiler_it_is_said_and_the_library_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
    with pytest.raises(cpu.Unavailable, match="no C compiler"):
        cpu.library.__wrapped__()


def test_a_compiler_that_fails_is_named_with_its_first_line(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'this compiler knows no such flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(cpu.Unavailable, match="knows no such flag"):
        cpu.library.__wrapped__()


def test_a_cache_that_can_not_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    if cpu.unavailable():
        pytest.skip(cpu.unavailable())
    with pytest.raises(cpu.Unavailable, match="can not be compiled"):
        cpu.library.__wrapped__()


def test_it_is_compiled_once(monkeypatch, tmp_path):
    if cpu.unavailable():
        pytest.skip(cpu.unavailable())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.library.__wrapped__()
    (compiled,) = (tmp_path / "clip-t5-captioner").iterdir()
    monkeypatch.setattr(cpu.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    cpu.library.__wrapped__()
    assert compiled.suffix == ".so"
