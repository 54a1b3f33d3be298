"""Write a trained run in other people's formats, read it back, and certify that it computes what the run does.

    python scripts/export.py --format merged                                the newest run as Hugging Face directories, LoRA folded in
    python scripts/export.py runs/NAME --format peft --output OUT           LoRA and soft prompts as PEFT loads them
    python scripts/export.py runs/NAME --format bundle --dtype bf16         everything in one safetensors file

Every result is a run too: captioner.load, evaluate.py and best_of_n.py take it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioner import cli  # noqa: E402
from captioner.cli import say, setting  # noqa: E402
from captioner.errors import UsageError  # noqa: E402
from captioner.files import write_json  # noqa: E402


@dataclass
class Settings:
    """Each field is one flag."""

    run: str | None = setting(None, "run directory or bundle (default: the newest under runs/)")
    format: str | None = setting(None, "adapters as PEFT's files, merged backbones as Hugging Face directories, or one file", ("peft", "merged", "bundle"))
    fold_rslora: bool = setting(False, "write LoRA's alpha times sqrt(rank), for runtimes that ignore use_rslora")
    dequantize: bool = setting(False, "merge into the dequantised weights of a run with --base-bits 4")
    dtype: str = setting("fp32", "of bridge and backbones in the files", ("fp32", "bf16"))
    checkpoint: str | None = setting(None, "export checkpoints/best or checkpoints/last", ("best", "last"))
    stack: tuple[str, ...] | None = setting(None, "bottleneck adapters that are on, the lowest first, or none; those of the run if not given")
    output: str | None = setting(None, "directory, or file of a bundle, that does not exist (RUN/exports/FORMAT, RUN/exports/NAME.safetensors if not given)")
    json: str | None = setting(None, "also write the certificate to this file, or - for stdout")

    positional = ("run",)


def main(argv: list[str] | None = None) -> int:
    settings = cli.parse_settings(Settings, argv, __doc__)
    # After the flags, so that --help and wrong flags need no torch.
    from captioner import checkpoint
    from captioner.export import FORMATS, export

    if settings.format is None:
        raise UsageError(f"--format is needed: one of {', '.join(FORMATS)}")
    run = Path(settings.run) if settings.run else checkpoint.newest_run()
    done = export(
        run, settings.format, settings.output, dtype=settings.dtype, fold_rslora=settings.fold_rslora, dequantize=settings.dequantize,
        checkpoint_name=settings.checkpoint, stack=settings.stack,
    )  # fmt: skip
    files, logits = done.certificate["files"], done.certificate["logits"]
    say(f"{done.output}: {run} as {settings.format}, {settings.dtype}, {sum(file['bytes'] for file in files.values()) / 1e6:.1f} MB")
    for name, file in files.items():
        say(f"  {name}  {file['bytes']:,} bytes")
    changed, asked = sum(row["run"] != row["export"] for row in done.certificate["captions"]), len(done.certificate["captions"])
    captions = "the same greedy captions" if done.certificate["same_captions"] else f"{changed} of {asked} greedy captions are others"
    say(
        f"read back: logits differ by up to {logits['largest_difference']:.2g}, on average {logits['mean_difference']:.2g} (standard deviation "
        f"{logits['standard_deviation']:.2g}); {captions}"
    )
    say(f"certificate: {done.certificate_path}")
    write_json(settings.json, done.certificate | {"output": str(done.output)})
    return cli.DONE


if __name__ == "__main__":
    cli.run_command(main)
