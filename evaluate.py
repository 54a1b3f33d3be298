"""Score a captioner, or captions that are already written.

    python evaluate.py [RUN] --split val --decode beam                decode a split with a run (the newest if not named), then score
    python evaluate.py --hypotheses H.txt --references R.txt          score finished captions; line k belongs to line k
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from captioner import cli
from captioner.cli import progress, repeated, say, setting
from captioner.errors import UsageError, UserError
from captioner.files import write_json, write_text


@dataclass
class Settings:
    """Every setting of an evaluation; each field is one flag."""

    run: str | None = setting(None, "run directory (default: the newest under runs/)")
    split: str = setting("val", "split to decode")
    data: str | None = setting(None, "folder with SPLIT/metadata.jsonl, or scenes; that of the run if not given")
    decode: str = setting("beam", "decoding method", ("greedy", "beam", "sample"))
    num_beams: int = setting(10, "beams")
    length_penalty: float = setting(1.0, "beam score is the sum of log-probabilities / length ** penalty")
    max_length: int | None = setting(None, "longest caption in tokens, counting the start token (default for beam: 20)")
    max_new_tokens: int | None = setting(None, "longest caption in tokens, not counting the start token (default otherwise: 20)")
    repetition_penalty: float | None = setting(None, "divides the scores of tokens already written (default: 1.2 for sample, else 1)")
    temperature: float = setting(0.5, "of sampling")
    top_k: int = setting(50, "sample among the k likeliest tokens; 0 for all")
    top_p: float = setting(0.9, "sample among the likeliest tokens that together reach p")
    checkpoint: str | None = setting(None, "use checkpoints/best or checkpoints/last", ("best", "last"))
    hypotheses: str | None = setting(None, "text file of captions to score, one a line")
    references: tuple[str, ...] = repeated("text file of references, one a line; may be given several times")
    tokenize: str = setting("ptb", "words: Penn Treebank tokens without punctuation, or split at spaces", ("ptb", "none"))
    limit: int | None = setting(None, "only the first N images or lines")
    batch_size: int = setting(16, "images decoded together")
    workers: int = setting(0, "processes that decode image files")
    cache_features: str | None = setting(None, "folder that keeps the frozen encoder's features, computed once")
    on_bad: str = setting("skip", "bad image: leave out, name and count it, or stop", ("skip", "fail"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = setting("fp32", "arithmetic of decoding", ("auto", "fp32", "bf16"))
    seed: int = setting(0, "of sampling")
    output: str | None = setting(None, "directory for the results (RUN/results/SPLIT-DECODE if not given)")
    json: str | None = setting(None, "write the scores to this file, or - for stdout")

    positional = ("run",)


def read_lines(path: str, limit: int | None) -> list[str]:
    """The lines of a UTF-8 text file, ended by newlines only. Raises UserError that names the file."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not UTF-8") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")][:limit] if text else []


def score_files(settings: Settings) -> dict:
    """Scores of a hypotheses file against one or more references files."""
    hypotheses = read_lines(settings.hypotheses, settings.limit)
    if not hypotheses:
        raise UserError(f"{settings.hypotheses}: no captions")
    columns = [read_lines(path, settings.limit) for path in settings.references]
    for path, lines in zip(settings.references, columns, strict=True):
        if len(lines) != len(hypotheses):
            raise UserError(f"{path} has {len(lines)} lines, {settings.hypotheses} has {len(hypotheses)}: line k must belong to line k")
    scores, _ = score(hypotheses, [list(texts) for texts in zip(*columns, strict=True)], settings.tokenize)
    return scores


def score(hypotheses: list[str], references: list[list[str]], tokenize: str) -> tuple[dict, list[dict]]:
    """({"Bleu_1" … "Bleu_4", "CIDEr", "n", "tokenize"}, the same metrics of each caption)."""
    from captioner import metrics

    corpus, per_item = metrics.score(hypotheses, references, tokenize)
    return {**corpus, "n": len(hypotheses), "tokenize": tokenize}, per_item


def decode_split(settings: Settings):
    """Captions of a split: (run, rows of {"image_id", "caption", "references"}, ledger of bad images)."""
    import torch

    from captioner import checkpoint, generate
    from captioner.features import FeatureStore
    from captioner.runtime import choose_device, choose_precision, encode_images
    from data.dataset import BadImageLedger, CaptionDataset, make_loader
    from data.readers import read

    run = Path(settings.run) if settings.run else checkpoint.newest_run()
    config = checkpoint.read_config(run)
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    data_rows = read(settings.data or config["settings"]["data"], settings.split)[: settings.limit]
    model, tokenizer, transform = checkpoint.load(run, checkpoint=settings.checkpoint, merge=True)
    model.to(device)
    ledger = BadImageLedger(settings.on_bad)
    store = None
    if settings.cache_features:
        store = FeatureStore(Path(settings.cache_features), checkpoint.vision_backbone(model, transform, config["model"]), precision)
        store.prepare(data_rows, ledger, device, settings.workers, progress=progress)
    dataset = CaptionDataset(data_rows, transform, store)
    loader = make_loader(dataset, None, settings.batch_size, range(len(data_rows)), settings.workers, "all", ledger=ledger)
    generate.prepare_for_decoding(model)
    say(f"{run}: {len(data_rows)} images of {settings.split}, {settings.decode}, {device}, {precision}")
    rows = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for batch in progress(loader, settings.decode):
            memory = encode_images(model, batch, device)
            captions = tokenizer.decode(decode(model, memory, batch["ids"], settings))
            rows += [
                {"image_id": image_id, "caption": caption, "references": references}
                for image_id, caption, references in zip(batch["ids"], captions, batch["captions"], strict=True)
            ]
    if not rows:
        raise UserError(f"no image of the split {settings.split} can be read")
    return run, rows, ledger


def decode(model, memory, image_ids: list[str], settings: Settings):
    """One caption an image by the method of the settings: ids (B, T)."""
    from captioner import generate

    length = {"max_length": settings.max_length, "max_new_tokens": settings.max_new_tokens}
    if settings.max_length is None and settings.max_new_tokens is None:
        length = {"max_length": 20} if settings.decode == "beam" else {"max_new_tokens": 20}
    penalty = settings.repetition_penalty or (1.2 if settings.decode == "sample" else 1.0)
    if settings.decode == "greedy":
        return generate.greedy(model, memory, repetition_penalty=penalty, **length)
    if settings.decode == "beam":
        return generate.beam_search(
            model, memory, num_beams=settings.num_beams, length_penalty=settings.length_penalty, repetition_penalty=penalty, **length
        )
    return generate.sample(
        model, memory, n=1, top_p=settings.top_p, temperature=settings.temperature, top_k=settings.top_k,
        repetition_penalty=penalty, seed=settings.seed, image_ids=image_ids, **length,
    )[:, 0]  # fmt: skip


def write_results(settings: Settings, directory: Path, rows: list[dict], per_item: list[dict], scores: dict) -> None:
    """captions.jsonl with a line an image, the COCO results format, and the scores."""
    lines = [json.dumps({**row, **item}, ensure_ascii=False) + "\n" for row, item in zip(rows, per_item, strict=True)]
    write_text(directory / "captions.jsonl", "".join(lines))
    write_json(directory / f"captions_{settings.split}_results.json", [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows])
    write_json(directory / "scores.json", scores)


def check(settings: Settings) -> None:
    """Refuse settings that contradict each other; raises UsageError."""
    if bool(settings.hypotheses) != bool(settings.references):
        raise UsageError("--hypotheses and --references go together")
    if settings.hypotheses and settings.run:
        raise UsageError("--hypotheses scores finished captions: give no run with it")
    if settings.max_length is not None and settings.max_new_tokens is not None:
        raise UsageError("--max-length and --max-new-tokens exclude each other")
    cli.require_positive(settings, "limit", "batch_size", "num_beams", "max_new_tokens")


def main(argv: list[str] | None = None) -> int:
    settings = cli.parse_settings(Settings, argv, __doc__)
    check(settings)
    started = time.perf_counter()
    if settings.hypotheses:
        scores, ledger = score_files(settings), []
    else:
        run, rows, ledger = decode_split(settings)
        scores, per_item = score([row["caption"] for row in rows], [row["references"] for row in rows], settings.tokenize)
        facts = {"decode": settings.decode, "split": settings.split, "seconds": time.perf_counter() - started, "bad_images": ledger.to_list()}
        directory = Path(settings.output) if settings.output else run / "results" / f"{settings.split}-{settings.decode}"
        write_results(settings, directory, rows, per_item, scores | facts)
        scores = scores | facts | {"run": str(run), "captions": str(directory / "captions.jsonl")}
    for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr"):
        say(f"{name:>8} {scores[name]:.4f}")
    say(f"{'n':>8} {scores['n']}   tokenize {scores['tokenize']}")
    write_json(settings.json, scores)
    if ledger:
        say(ledger.summary())
        return cli.SOME_BAD
    return cli.DONE


if __name__ == "__main__":
    cli.run_command(main, expected=(ValueError,))
