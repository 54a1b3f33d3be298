"""Decoding against transformers' generate, fp32 against fp32 on the CPU.

    python scripts/bench/decode.py [--only ID,ID] [--pairs 5] [--threads N] [--json PATH|-]

Flan-T5-base decoder with random weights, 197 image tokens, 20 new tokens: end-of-sequence is made impossible on both sides, so that neither
stops early. Both get the memory as it is; theirs are plain (merged) weights. Greedy and beam ids are compared before they are timed.
Memory is the growth of the resident set over a loaded, warmed-up process, each side in processes of its own.
"""

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace

import common
import torch
from torch import Tensor, nn

from captioner import generate
from captioner.runtime import PeakMemory, process_memory
from captioner.t5 import T5, T5Config
from captioner.weights import t5_to_hf

SIZE, IMAGE_TOKENS, NEW_TOKENS = "flan-t5-base", 197, 20
SAMPLING = dict(top_p=0.9, temperature=0.5, top_k=50, repetition_penalty=1.2)
PEER = "transformers"
PACKAGES = ("torch", PEER)
ROWS = {"D1": 1, "D3a": 10, "D3b": 40, "D5": 10}  # that a step decodes
IDS = (*ROWS, "D4")


def build_ours() -> SimpleNamespace:
    """A decoder with random weights that never ends a caption, as `generate` takes it."""
    torch.manual_seed(0)
    config = T5Config.from_name(SIZE)
    config.num_layers = 0
    text = T5(config).eval().requires_grad_(False)
    text.lm_head.weight[config.eos_token_id] = 0  # a logit of 0 among 32,128 of standard deviation 1 is never near the best
    return SimpleNamespace(text=text)


def build_peer(model: SimpleNamespace) -> nn.Module:
    """transformers' model with the weights of ours; its encoder is left without layers, since the memory is given."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = model.text.config
    peer = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size, d_model=config.d_model, d_kv=config.d_kv, d_ff=config.d_ff, num_heads=config.num_heads,
            num_layers=config.num_decoder_layers,  # generate sizes its cache by it
            num_decoder_layers=config.num_decoder_layers, feed_forward_proj=config.feed_forward_proj, tie_word_embeddings=False,
            decoder_start_token_id=config.decoder_start_token_id,
        )
    )  # fmt: skip
    peer.encoder.block = nn.ModuleList()
    # transformers 5 ties the head of every T5 that is made from a config; only a checkpoint unties it.
    peer.lm_head.weight = nn.Parameter(torch.empty_like(peer.lm_head.weight))
    missing, unexpected = peer.load_state_dict(t5_to_hf(model.text.state_dict(), config), strict=False)
    if unexpected or any(not name.startswith(("encoder.", "decoder.embed_tokens.")) for name in missing):
        raise RuntimeError(f"the peer's weights do not fit: missing {missing}, unexpected {unexpected}")
    return peer.eval().requires_grad_(False)


def peer_generate(peer: nn.Module, memory: Tensor, **options) -> Tensor:
    """Ids of transformers for an image memory."""
    from transformers.modeling_outputs import BaseModelOutput

    mask = torch.ones(memory.shape[:2], dtype=torch.long)
    return peer.generate(encoder_outputs=BaseModelOutput(memory), attention_mask=mask, max_new_tokens=NEW_TOKENS, **options)


def cases(model: SimpleNamespace, peer: nn.Module | None) -> dict[str, tuple[str, float, Callable[[], Tensor], Callable[[], Tensor]]]:
    """By row id: what it times, its bar, our side and theirs; each side returns ids."""
    memory = torch.randn(4, IMAGE_TOKENS, model.text.config.d_model, generator=torch.Generator().manual_seed(1))

    def beam(batch: int):
        return (
            lambda: generate.beam_search(model, memory[:batch], num_beams=10, max_new_tokens=NEW_TOKENS),
            lambda: peer_generate(peer, memory[:batch], num_beams=10, do_sample=False),
        )

    return {
        "D1": (
            "greedy, B=1",
            1.2,
            lambda: generate.greedy(model, memory[:1], max_new_tokens=NEW_TOKENS),
            lambda: peer_generate(peer, memory[:1], num_beams=1, do_sample=False),
        ),
        "D3a": ("beam 10, B=1", 1.5, *beam(1)),
        "D3b": ("beam 10, B=4", 2.5, *beam(4)),
        "D5": (
            "10 samples, B=1",
            1.3,
            lambda: generate.sample(model, memory[:1], n=10, max_new_tokens=NEW_TOKENS, **SAMPLING)[0],
            lambda: peer_generate(peer, memory[:1], num_return_sequences=10, do_sample=True, **SAMPLING),
        ),
    }


def check(id: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise RuntimeError unless both wrote all tokens and, where nothing is drawn, the same ones."""
    if ours.shape != theirs.shape or ours.shape[1] != NEW_TOKENS + 1:
        raise RuntimeError(f"{id}: ids of shape {tuple(ours.shape)} here, {tuple(theirs.shape)} there, and not {NEW_TOKENS} tokens on both")
    if id != "D5" and not torch.equal(ours, theirs):
        raise RuntimeError(f"{id}: the two sides do not write the same tokens")


def run(pairs: int = 5, only: Collection[str] | None = None, clock: Callable[[], float] | None = None) -> list[dict]:
    """The rows named, or all. clock defaults to wall time with several threads and to this process's CPU seconds with one."""
    only = IDS if only is None else only
    clock = clock or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    rows = []
    if set(only) - {"D4"}:
        model = build_ours()
        timed = cases(model, build_peer(model))
        for id, (what, must, ours, theirs) in timed.items():
            if id in only:
                generate.prepare_for_decoding(model, rows=ROWS[id])
                check(id, ours(), theirs())
                seconds = common.interleave({"ours": ours, "theirs": theirs}, pairs, warmup=0, clock=clock)
                clock_name = "cpu seconds" if clock is time.process_time else "wall seconds"
                rows.append(_row(id, what, must, **seconds, threads=torch.get_num_threads(), clock=clock_name))
    if "D4" in only:
        measured = {side: [_memory_of_a_process(side) for _ in range(2)] for side in ("ours", "theirs")}
        rows.append(_row("D4", "peak memory above the weights, beam 10, B=4", 3.0, **measured, unit="bytes"))
    return rows


def _row(id: str, what: str, must: float, **values) -> dict:
    what = f"{what}, {SIZE}, {IMAGE_TOKENS} image tokens, {NEW_TOKENS} new"
    return common.row(id, what, peer=PEER, must=must, dtype="fp32 vs fp32", **values)


def _memory_of_a_process(side: str) -> int:
    """Bytes that a fresh process of one side needs for the beam search of D3b beyond what it holds before."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"D4: the process of {side} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def memory_growth(side: str) -> int:
    """What `_memory_of_a_process` returns, measured here, on Linux: the resident set's peak in the search less its size before."""
    model = build_ours()
    peer = build_peer(model) if side == "theirs" else None
    if peer is not None:
        model = SimpleNamespace(text=SimpleNamespace(config=model.text.config))
    else:
        generate.prepare_for_decoding(model, rows=ROWS["D3b"])
    work = cases(model, peer)
    at = 2 if side == "ours" else 3
    work["D1"][at]()  # what libraries allocate once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    peak, before = PeakMemory(torch.device("cpu")), process_memory("VmRSS")
    work["D3b"][at]()
    return peak.bytes() - before


def main() -> int:
    parser = common.argument_parser(__doc__.split("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="ID,ID", help=f"rows, of {', '.join(IDS)}")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="interleaved pairs per row (default 5)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch; with 1, CPU seconds are measured")
    parser.add_argument("--memory-of", choices=("ours", "theirs"), help="print the bytes of one side of D4, measured in this process")
    arguments = parser.parse_args()
    if unknown := set(arguments.only or ()) - set(IDS):
        parser.error(f"no row {', '.join(sorted(unknown))}: choose from {', '.join(IDS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(memory_growth(arguments.memory_of))
        return 0
    common.report(run(arguments.pairs, arguments.only), arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
