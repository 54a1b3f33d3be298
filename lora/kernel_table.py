"""Which implementation of the LoRA linear is the faster one for a shape on a GPU: a table of measurements, `kernel_table.json`.

A row holds for one GPU model, one bucket of M and exactly one of everything else; whatever has no row is computed by the cuBLAS forms. Nothing is
measured when a model runs: `scripts/bench/tune_lora.py` fills the table, and the file's `schema` says what its fields mean.

Legend: M rows of x, K input features, N output features of all adapters together, R rank, n adapters that share x.
"""

import json
from pathlib import Path

PATH = Path(__file__).with_name("kernel_table.json")
IMPLEMENTATIONS = ("triton", "fused")
KEY = ("gpu", "rows", "in_features", "out_features", "adapters", "rank", "dropout", "dtype")


def bucket(M: int) -> int:
    """The smallest power of two that is at least M (1 for M = 0)."""
    return 1 << (max(M, 1) - 1).bit_length()


def key(device_name: str, M: int, K: int, N: int, n: int, R: int, rate: float, dtype) -> tuple:
    """What a row is found by, in the order of KEY; dtype is a torch.dtype or its name."""
    return device_name, bucket(M), K, N, n, R, rate > 0, str(dtype).removeprefix("torch.")


def read(path: Path) -> dict[tuple, tuple[str, str, str]]:
    """What `choose` answers by key. Raises ValueError on a row with a field missing, an unknown implementation, or a key that is there twice."""
    answers: dict[tuple, tuple[str, str, str]] = {}
    for number, row in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))["rows"], start=1):
        if missing := [name for name in (*KEY, "implementation", "config", "seconds", "versions") if name not in row]:
            raise ValueError(f"{path}: row {number} has no {', '.join(missing)}")
        if row["implementation"] not in IMPLEMENTATIONS:
            raise ValueError(f"{path}: row {number} has implementation {row['implementation']!r}, not one of {', '.join(IMPLEMENTATIONS)}")
        if (place := tuple(row[name] for name in KEY)) in answers:
            raise ValueError(f"{path}: row {number} repeats the key of an earlier one")
        seconds = ", ".join(f"{name} {value * 1e6:.1f} us" for name, value in sorted(row["seconds"].items()))
        answers[place] = row["implementation"], json.dumps(row["config"]), f"measured on {row['gpu']}: {seconds}"
    return answers


TABLE = read(PATH)  # when imported, not when asked: torch.compile traces `choose`, and can trace no file


def choose(device_name: str, M: int, K: int, N: int, n: int, R: int, rate: float, dtype, table=TABLE) -> tuple[str, str, str]:
    """(implementation, launch settings as JSON for `triton_lora.lora_linears`, reason in one line) for a LoRA linear of this shape; "fused" and no
    settings where nothing was measured."""
    answer = table.get(key(device_name, M, K, N, n, R, rate, dtype))
    if answer is not None:
        return answer
    known = any(place[0] == device_name for place in table)
    return "fused", "", f"no measurement of this shape on {device_name}" if known else f"no measurement for {device_name}"
