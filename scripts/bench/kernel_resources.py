"""Registers, spills and shared memory of every kernel of the LoRA linear, compiled for GPUs that need not be there.

    python scripts/bench/kernel_resources.py [--json PATH|-]

Each kernel is compiled with the launch settings of `triton_lora.default_config` for sm_80 and sm_90, bf16 and fp32, ranks 8, 32 and 64, with dropout,
fp32 A and B; y and dx in both forms, with cuBLAS's product and with their own. The numbers are those of the assembled code: `stack` is bytes of local
memory a thread, which is where spilled registers go. The table goes to results/kernel_resources.json, or to PATH; exit code 1 where a kernel spills.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import common
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora import triton_kernels, triton_lora

TARGETS = (80, 90)
DTYPES = (torch.bfloat16, torch.float32)
RANKS = (8, 32, 64)
RESULT = Path(__file__).parent / "results" / "kernel_resources.json"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTERS = dict.fromkeys(("A", "B", "dA_parts", "dB_parts", "scales"), "*fp32") | {"state": "*i64", "adapters": "*i64", "offsets": "*i32"}
OPERANDS = ("x", "W", "bias", "hidden", "dhidden", "y", "dy", "dx")


def compile_kernel(kernel: str, settings: dict, rank: int, dtype: torch.dtype, target: int, adapters: int = 1, dropout: bool = True):
    """The compiled form of one kernel (`asm["cubin"]`, `asm["ptx"]`) for compute capability target / 10, without a GPU."""
    settings = dict(settings)
    options = {"enable_fp_fusion": True} | {name: settings.pop(name) for name in ("num_warps", "num_stages")}
    flags = {name: True for name in ("BIAS", "ALIGNED", "NEED_DHIDDEN", "NEED_DB")}
    flags |= {"DROPOUT": dropout, "PRODUCT": bool(settings.pop("product", False))}
    sizes = {"R": rank, "ADAPTERS": adapters, "BLOCK_R": triton_lora.padded_rank(rank), "COMPUTE": getattr(tl, str(dtype).removeprefix("torch."))}
    function = getattr(triton_kernels, f"{kernel}_kernel")
    values = {name: value for name, value in {**flags, **sizes, **settings}.items() if name in function.arg_names}
    pointers = POINTERS | {name: f"*{TYPES[dtype]}" for name in OPERANDS}
    signature = {name: "constexpr" if name in values else pointers.get(name, "i32") for name in function.arg_names}
    divisible = [name for name in signature if name in pointers or name in ("N", "K") or name.endswith("_stride")]
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(function, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(compiled) -> dict[str, int]:
    """Registers and bytes of stack a thread, and bytes of shared memory a program."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


def variants(targets=TARGETS, dtypes=DTYPES, ranks=RANKS) -> Iterator[tuple[str, dict, int, torch.dtype, int]]:
    """(kernel, settings, rank, dtype, target) of everything that is recorded."""
    for target in targets:
        for dtype in dtypes:
            for rank in ranks:
                for kernel, settings in triton_lora.default_config(dtype).items():
                    for product in (False, True) if "product" in settings else ():
                        yield kernel, {**settings, "product": product}, rank, dtype, target
                    if "product" not in settings:
                        yield kernel, settings, rank, dtype, target


def describe(kernel: str, settings: dict, rank: int, dtype: torch.dtype, target: int) -> tuple:
    """What an entry says of a variant: (name, target, dtype, rank, settings)."""
    return f"{kernel}{' with its product' if settings.get('product') else ''}", f"sm_{target}", TYPES[dtype], rank, settings


def run(**selection) -> list[dict]:
    """One entry per variant."""
    names = ("kernel", "target", "dtype", "rank", "settings")
    return [{**dict(zip(names, describe(*variant))), **resources(compile_kernel(*variant))} for variant in variants(**selection)]


def main() -> int:
    parser = common.argument_parser(__doc__.split("\n")[0])
    arguments = parser.parse_args()
    if triton_kernels.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing is compiled under the interpreter")
    entries = run()
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    text = f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n'
    if arguments.json == "-":
        sys.stdout.write(text)
    else:
        Path(arguments.json or RESULT).write_text(text, encoding="utf-8")
    for entry in entries:
        print(*(entry[key] for key in ("kernel", "target", "dtype", "rank", "registers", "stack", "shared")), sep="\t", file=sys.stderr)
    return 1 if any(entry["stack"] for entry in entries) else 0


if __name__ == "__main__":
    common.run_main(main)
