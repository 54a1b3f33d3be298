"""The Triton LoRA linear and its table: where it says it can run, its kernels in the interpreter, compiled for GPUs that are not here, and on one.

Triton reads TRITON_INTERPRET when it is imported, so lora_kernel_checks.py runs in a process of its own: with it on the CPU, without it on a GPU.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from lora import kernel_table, triton_lora
from tests.conftest import REPOSITORY

triton_installed = pytest.mark.skipif(triton_lora.kernels is None, reason="triton is not installed")
compiled = pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="nothing is compiled under TRITON_INTERPRET")


def run_checks(**variables) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/lora_kernel_checks.py"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@triton_installed
def test_every_kernel_in_the_interpreter():
    run_checks(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@triton_installed
def test_every_kernel_on_a_gpu():
    run_checks()


@triton_installed
@compiled
def test_available_on_a_cpu_says_what_is_missing():
    assert triton_lora.available(torch.zeros(1)) == "Triton needs a CUDA device, x is on cpu"


def test_without_triton():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, lora\nfrom lora import triton_lora\n"
        "reason = triton_lora.available(torch.zeros(1))\n"
        "assert reason.startswith('triton can not be imported: '), reason\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


@triton_installed
@compiled
def test_another_batch_is_no_other_kernel():
    for name in triton_lora.default_config(torch.float32):
        parameters = {parameter.name: parameter for parameter in getattr(triton_lora.kernels, f"{name}_kernel").params}
        for argument in {"M", "keep_levels"} & set(parameters):
            assert parameters[argument].do_not_specialize, (name, argument)
        assert not any(parameters[argument].is_constexpr for argument in ("M", "N", "K") if argument in parameters)


def kernel_resources(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    return importlib.import_module("kernel_resources")


def triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@triton_installed
@compiled
@pytest.mark.skipif(triton_lora.kernels is not None and triton_version() < (3, 3), reason="triton.compile took other arguments before 3.3")
@pytest.mark.parametrize(
    "selection",
    [
        dict(dtypes=[torch.bfloat16], ranks=[8]),
        pytest.param(dict(dtypes=[torch.bfloat16], ranks=[32, 64]), marks=pytest.mark.slow),
        pytest.param(dict(dtypes=[torch.float32]), marks=pytest.mark.slow),
    ],
    ids=["bf16 rank 8", "bf16 other ranks", "fp32"],
)
def test_every_kernel_compiles_for_gpus_without_spilling(selection, monkeypatch):
    for entry in kernel_resources(monkeypatch).run(**selection):
        # Triton 3.8 keeps 24 bytes of one fp32 kernel of rank 64 on the stack; 3.2, 3.6 and 3.9 none.
        assert entry["stack"] <= (24 if entry["rank"] == 64 and entry["dtype"] == "fp32" else 0) and entry["shared"] <= 99 * 1024, entry


@triton_installed
@compiled
def test_the_recorded_resources_are_those_of_the_default_settings(monkeypatch):
    bench = kernel_resources(monkeypatch)
    recorded = json.loads(bench.RESULT.read_text(encoding="utf-8"))["kernels"]
    described = [(entry["kernel"], entry["target"], entry["dtype"], entry["rank"], entry["settings"]) for entry in recorded]
    assert described == [bench.describe(*variant) for variant in bench.variants()]
    assert all(entry["stack"] == 0 and 0 < entry["registers"] < 256 for entry in recorded)


ROW = {
    "gpu": "NVIDIA X", "rows": 4096, "in_features": 768, "out_features": 2304, "adapters": 3, "rank": 8, "dropout": True, "dtype": "bfloat16",
    "implementation": "triton", "config": {"hidden": {"BLOCK_M": 16}}, "seconds": {"triton": 1e-5, "fused": 2e-5},
    "versions": {"torch": "2.11", "triton": "3.6"},
}  # fmt: skip


def write_table(path, *rows):
    path.write_text(json.dumps({"schema": {}, "rows": rows}), encoding="utf-8")
    return path


def test_the_table_answers_for_its_bucket_only(tmp_path):
    rows = ROW, ROW | {"rows": 2048, "implementation": "fused"}, ROW | {"gpu": "NVIDIA Y", "dropout": False}
    table = kernel_table.read(write_table(tmp_path / "table.json", *rows))

    def choose(device="NVIDIA X", M=2560, K=768, N=2304, n=3, R=8, rate=0.1, dtype=torch.bfloat16):
        return kernel_table.choose(device, M, K, N, n, R, rate, dtype, table)

    expected = ("triton", json.dumps(ROW["config"]), "measured on NVIDIA X: fused 20.0 us, triton 10.0 us")
    assert [choose(M=M) for M in (2049, 2560, 4096)] == [expected] * 3
    assert choose(M=2048)[0] == choose(M=1025)[0] == "fused"
    others = [dict(M=4097), dict(M=0), dict(K=769), dict(N=768), dict(n=2), dict(R=16), dict(rate=0.0), dict(dtype=torch.float16)]
    for other in others:
        assert choose(**other) == ("fused", "", "no measurement of this shape on NVIDIA X"), other
    assert choose("NVIDIA Y")[2] == "no measurement of this shape on NVIDIA Y" and choose("NVIDIA Y", rate=0.0)[0] == "triton"
    assert choose("NVIDIA Z") == ("fused", "", "no measurement for NVIDIA Z")


def test_the_choice_can_be_traced():
    def plus_one_where_fused(x):
        return x + (kernel_table.choose("NVIDIA Z", *x.shape, 32, 1, 8, 0.1, x.dtype)[0] == "fused")

    assert torch.compile(plus_one_where_fused, fullgraph=True, backend="eager")(torch.zeros(3, 5)).eq(1).all()


@pytest.mark.parametrize(
    "row, message",
    [
        ({name: value for name, value in ROW.items() if name != "rank"}, "row 2 has no rank"),
        (ROW | {"implementation": "cutlass", "rank": 4}, "row 2 has implementation 'cutlass'"),
        (ROW, "row 2 repeats the key"),
    ],
)
def test_a_broken_table_is_an_error(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        kernel_table.read(write_table(tmp_path / "table.json", ROW, row))


def test_the_shipped_table_is_sound():
    table = json.loads(kernel_table.PATH.read_text(encoding="utf-8"))
    for row in table["rows"]:
        assert set(row["config"]) <= set(triton_lora.default_config(getattr(torch, row["dtype"])))
        assert set(row["seconds"]) == set(kernel_table.IMPLEMENTATIONS) and row["implementation"] == min(row["seconds"], key=row["seconds"].get)
    assert set(kernel_table.KEY) <= set(table["schema"]) and len(kernel_table.TABLE) == len(table["rows"])


