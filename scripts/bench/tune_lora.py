"""Measures the LoRA linear on the GPU that is here and writes what is fastest into lora/kernel_table.json.

    python scripts/bench/tune_lora.py [--ranks 8] [--dtypes bfloat16] [--models base,large] [--table PATH]

For every shape of the decoder's LoRA linears at batch 128: each kernel is timed with each candidate of launch settings, the five winners make the
Triton form, and that is timed against the cuBLAS form, forward and backward, in replayed CUDA graphs. A candidate whose results differ from fp32 is
left out before it is timed, with a line that says so. Rows of the same key are replaced, others stay. Needs a CUDA device.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import torch
import triton
from lora_linear import DROPOUT, RANK, Ours, graphed, largest_error, results

from lora import kernel_table, masks, triton_lora

TEXT_ROWS, IMAGE_ROWS = (1024, 2048, 2560, 5120), (128 * 197,)  # batch 128 times caption lengths 8 to 40, times 197 image tokens
WIDTHS = {"base": (768, 2048, 12), "large": (1024, 2816, 24)}  # d_model, d_ff, layers
WORST_ERROR = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
REPLAYS = 20


def shapes(models: list[str]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(rows, inputs, outputs of each adapter) of the decoder's linears, fused as the models fuse them."""
    for d_model, d_ff, layers in (WIDTHS[name] for name in models):
        text = [(d_model, (d_model,)), (d_model, (d_model,) * 3), (d_model, (d_ff,) * 2), (d_ff, (d_model,))]
        image = [(d_model, (d_model,) * 2), (d_model, (d_model,) * 2 * layers)]
        for rows_of, linears in ((TEXT_ROWS, text), (IMAGE_ROWS, image)):
            yield from ((rows, inputs, sizes) for rows, (inputs, sizes) in itertools.product(rows_of, linears))


def candidates(dtype: torch.dtype) -> dict[str, list[dict]]:
    """Launch settings to try, by kernel; the default is the first of each. In fp32 the products run without tensor cores, so only the default is."""
    default = triton_lora.default_config(dtype)
    if dtype == torch.float32:
        return {kernel: [settings] for kernel, settings in default.items()}

    def table(names: str, *rows: tuple, **more) -> list[dict]:
        return [{**more, **dict(zip(names.split(), row))} for row in rows]

    block = "BLOCK_M BLOCK_N num_warps num_stages"
    tile = "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages"
    added = ((32, 128, 64, 4, 3), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (128, 128, 64, 8, 3))
    own = ((64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3))
    own_dx = ((64, 64, 64, 4, 4), (64, 64, 128, 4, 4), (128, 64, 64, 4, 4), (128, 64, 128, 8, 3), (128, 64, 128, 8, 4))
    added_dx = ((32, 64, 128, 4, 3), (64, 64, 128, 4, 3), (128, 64, 64, 4, 3), (128, 64, 128, 8, 3))
    found = {
        "hidden": table(
            "BLOCK_M BLOCK_K num_warps num_stages",
            (16, 128, 4, 3), (16, 256, 4, 3), (32, 64, 2, 4), (32, 256, 4, 2), (64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 8, 3),
        ),
        "output": table(tile, *added, product=False, GROUP_M=8) + table(tile, *own, product=True, GROUP_M=8),
        "output_gradient": table(block, (16, 128, 4, 3), (32, 64, 4, 3), (32, 128, 4, 3), (64, 128, 4, 3), (128, 64, 4, 3), (128, 128, 8, 3)),
        "input_gradient": table(tile, *added_dx, product=False, GROUP_M=8) + table(tile, *own_dx, product=True, GROUP_M=8),
        "A_gradient": [
            {"ROWS": rows, **settings}
            for rows in (128, 256, 512, 1024)
            for settings in table("BLOCK_M BLOCK_K num_warps num_stages", (32, 128, 4, 3), (64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 4, 3))
        ],
    }  # fmt: skip
    return {kernel: [default[kernel], *(settings for settings in found[kernel] if settings != default[kernel])] for kernel in default}


class Problem(Ours):
    """One shape, its tensors, the intermediate results that the kernels take, and what fp32 makes of it."""

    def __init__(self, shape, dtype: torch.dtype, rank: int = RANK, device: str = "cuda"):
        super().__init__(shape, torch.float32, device, dtype, rank)
        self.expected, self.tolerance = self.reference(), WORST_ERROR[dtype]
        together = (torch.cat([tensor.detach() for tensor in tensors]) for tensors in (self.weights, self.biases, self.As, self.Bs))
        self.weight, self.bias, self.A, self.B = together
        self.dy = torch.cat(self.dys, dim=1)
        plan = self.plan({})
        with torch.no_grad():
            self.hidden = triton_lora.hidden_of(self.x, self.A, self.state, plan)
            self.dhidden, _ = triton_lora.output_gradients(self.dy, self.B, self.hidden, plan, True, False)

    def plan(self, config: dict) -> triton_lora.Plan:
        """The plan with these launch settings."""
        scales = (self.scaling / masks.keep_probability(DROPOUT),) * len(self.sizes)
        arguments = tuple(self.sizes), scales, tuple(self.streams), DROPOUT, json.dumps(config), self.x.dtype, self.x.device
        return triton_lora.make_plan(self.rank, *arguments)

    def kernel(self, name: str, settings: dict) -> Callable[[], object]:
        """A call of one kernel, with the cuBLAS product that it adds to where it does."""
        plan = self.plan({name: settings})
        x, A, B = self.x.detach(), self.A, self.B
        return {
            "hidden": lambda: triton_lora.hidden_of(x, A, self.state, plan),
            "output": lambda: triton_lora.output_of(x, self.weight, self.bias, self.hidden, B, plan),
            "output_gradient": lambda: triton_lora.output_gradients(self.dy, B, self.hidden, plan, True, True),
            "input_gradient": lambda: triton_lora.input_gradient(self.dy, self.weight, self.dhidden, A, self.state, plan),
            "A_gradient": lambda: triton_lora.A_gradient(self.dhidden, x, A, self.state, plan),
        }[name]

    def training_pass(self, implementation: str, **options) -> Callable[[], list]:
        """The y_i, dx, dA_i and dB_i as a model's training computes them."""
        return lambda: results(self.outputs_of(implementation, **options), self.trained, self.dys)

    def wrong(self, results: list) -> float | None:
        """The largest relative error, where it is too large."""
        error = largest_error(results, self.expected)
        return None if error < self.tolerance else error


def seconds(function: Callable[[], object], copies: int = 10) -> float:
    """GPU seconds of one call: the median of replayed graphs of `copies` calls."""
    graph = graphed(function, copies)
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS)] for _ in range(2))
    for start, end in zip(starts, ends):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends)) / 1e3 / copies


def best_settings(problem: Problem, name: str, tried: list[dict]) -> dict:
    """The fastest of the candidates that are right."""
    times = {}
    for index, settings in enumerate(tried):
        try:
            if (error := problem.wrong(problem.training_pass("triton", config=json.dumps({name: settings}))())) is not None:
                print(f"  {name} {settings}: wrong by {error:.1e}, left out", file=sys.stderr)
                continue
            times[index] = seconds(problem.kernel(name, settings))
        except triton.runtime.errors.OutOfResources as reason:
            print(f"  {name} {settings}: {reason}", file=sys.stderr)
    if not times:
        raise RuntimeError(f"no candidate for the {name} kernel gives the results of fp32")
    return tried[min(times, key=times.get)]


def measure(shape: tuple, rank: int, dtype: torch.dtype) -> dict:
    """The table's row of one shape."""
    M, K, sizes = shape
    torch.manual_seed(0)
    problem = Problem(shape, dtype, rank)
    config = {name: best_settings(problem, name, tried) for name, tried in candidates(dtype).items()}
    passes = {"triton": problem.training_pass("triton", config=json.dumps(config)), "fused": problem.training_pass("fused")}
    for name, run in passes.items():
        if (error := problem.wrong(run())) is not None:
            raise RuntimeError(f"{name} at {shape}: wrong by {error:.1e}")
    times = {name: seconds(run) for name, run in passes.items()}
    key = kernel_table.key(torch.cuda.get_device_name(), M, K, sum(sizes), len(sizes), rank, DROPOUT, dtype)
    more = {"implementation": min(times, key=times.get), "config": config, "seconds": times, "measured_rows": M}
    return {**dict(zip(kernel_table.KEY, key)), **more, "versions": {name: common.version(name) for name in ("torch", "triton")}}


def write(path: Path, rows: list[dict]) -> None:
    """Put rows into a table, in place of those of the same key; one row a line."""
    table = json.loads(path.read_text(encoding="utf-8"))
    merged = {tuple(row[name] for name in kernel_table.KEY): row for row in [*table["rows"], *rows]}
    lines = ",\n".join(f"    {json.dumps(merged[key])}" for key in sorted(merged))
    schema = json.dumps(table["schema"], indent=2).replace("\n", "\n  ")
    path.write_text(f'{{\n  "schema": {schema},\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--dtypes", default="bfloat16", metavar="NAME,NAME", help=f"of {', '.join(str(d)[6:] for d in triton_lora.DTYPES)}")
    parser.add_argument("--ranks", default=str(RANK), metavar="R,R", help=f"up to {triton_lora.MAX_RANK} (default {RANK})")
    parser.add_argument("--models", default="base", metavar="NAME,NAME", help=f"of {', '.join(WIDTHS)}")
    parser.add_argument("--table", type=Path, default=kernel_table.PATH, metavar="PATH", help="the table to write into (default: the shipped one)")
    arguments = parser.parse_args()
    models, names = arguments.models.split(","), arguments.dtypes.split(",")
    if unknown := (set(models) - set(WIDTHS)) | (set(names) - {str(dtype)[6:] for dtype in triton_lora.DTYPES}):
        parser.error(f"unknown {', '.join(sorted(unknown))}")
    if not all(rank.isdigit() and 1 <= int(rank) <= triton_lora.MAX_RANK for rank in arguments.ranks.split(",")):
        parser.error(f"--ranks {arguments.ranks}: ranks are 1 to {triton_lora.MAX_RANK}")
    if not torch.cuda.is_available():
        print("error: the LoRA linear is tuned on a CUDA device, and there is none", file=sys.stderr)
        return 1
    dtypes, ranks = [getattr(torch, name) for name in names], [int(rank) for rank in arguments.ranks.split(",")]
    for dtype, rank, shape in itertools.product(dtypes, ranks, list(shapes(models))):
        start = time.perf_counter()
        row = measure(shape, rank, dtype)
        write(arguments.table, [row])
        times = ", ".join(f"{name} {value * 1e6:.1f} us" for name, value in row["seconds"].items())
        print(f"{row['in_features']} -> {row['out_features']}, {shape[0]} rows: {times}, in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    common.run_main(main)
