"""Decoding of one image or a few against transformers' generate and peft; all rows are measured on the CPU.

    python scripts/bench/decode.py [--only ID,ID] [--pairs 5] [--threads N] [--json PATH|-]

Flan-T5-base decoder with random weights and LoRA of rank 8 on all its attention and feed-forward layers, 197 image tokens, 20 new tokens:
end-of-sequence is made impossible on both sides, so that neither stops early. Both get the memory as it is; the LoRA is merged in ours and, but for the
rows against peft, in theirs. D rows are fp32 against fp32, and greedy and beam ids are compared before they are timed. C4 rows are int8 against
peft's unmerged fp32 (-peft) and against merged bf16 (-bf16), and bf16 against merged bf16 (-same). With random weights the likeliest tokens are close to
each other, so that rounding soon leads to other texts: the share of equal tokens is printed, and what is checked before timing is the logits of our steps
over one given text, against transformers' in fp32: bf16 at most twice as far off as theirs, int8 at most 10 %. Sampling rows are compared by those logits
and by what transformers' processors make of them.
Memory is the growth of the resident set over a loaded, warmed-up process, each side in processes of its own.
"""

import copy
import ctypes
import functools
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import common
import torch
from torch import Tensor, nn

from captioner import generate
from captioner.cache import DecoderCache
from captioner.runtime import PeakMemory, process_memory
from captioner.t5 import T5, T5Config
from captioner.weights import HF_T5, load_into, t5_to_hf

SIZE, IMAGE_TOKENS, NEW_TOKENS = "flan-t5-base", 197, 20
RANK, ADAPTED = 8, r"decoder\..*\.(q|k|v|o|wi_0|wi_1|wo)"
SAMPLING = dict(top_p=0.9, temperature=0.5, top_k=50, repetition_penalty=1.2)
PACKAGES = ("torch", "transformers", "peft")


@dataclass
class Case:
    """A kind of decoding: what it is called, images, rows that a step decodes, our options and theirs; `drawn` where chance decides."""

    what: str
    images: int
    rows: int
    ours: Callable[..., Tensor]
    options: dict
    theirs: dict
    drawn: bool = False


GREEDY = Case("greedy, B=1", 1, 1, generate.greedy, {}, dict(num_beams=1, do_sample=False))
BEAM = Case("beam 10, B=1", 1, 10, generate.beam_search, dict(num_beams=10), dict(num_beams=10, do_sample=False))
BEAM_OF_4 = Case("beam 10, B=4", 4, 40, generate.beam_search, dict(num_beams=10), dict(num_beams=10, do_sample=False))
SAMPLES = Case("10 samples, B=1", 1, 10, generate.sample, dict(n=10, **SAMPLING), dict(num_return_sequences=10, do_sample=True, **SAMPLING), drawn=True)

# By row id: the case, the bar, our precision, their weights.
TIMED = {
    "D1": (GREEDY, 1.2, "fp32", "fp32"),
    "D3a": (BEAM, 1.5, "fp32", "fp32"),
    "D3b": (BEAM_OF_4, 2.5, "fp32", "fp32"),
    "D5": (SAMPLES, 1.3, "fp32", "fp32"),
    "C4-greedy-peft": (GREEDY, 3.5, "int8", "peft"),
    "C4-greedy-bf16": (GREEDY, 2.0, "int8", "bf16"),
    "C4-greedy-same": (GREEDY, None, "bf16", "bf16"),
    "C4-beam-peft": (BEAM, 5.0, "int8", "peft"),
    "C4-beam-bf16": (BEAM, 2.2, "int8", "bf16"),
    "C4-beam-same": (BEAM, None, "bf16", "bf16"),
    "C4-samples-peft": (SAMPLES, 4.0, "int8", "peft"),
    "C4-samples-bf16": (SAMPLES, 1.8, "int8", "bf16"),
    "C4-samples-same": (SAMPLES, None, "bf16", "bf16"),
}
IDS = (*TIMED, "D4")


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


def add_lora(peer: nn.Module) -> nn.Module:
    """peft's LoRA with random A and B on the peer, which is changed; its `merge_and_unload` gives the merged weights."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(peer, LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.1, target_modules=ADAPTED, task_type="SEQ_2_SEQ_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return adapted.eval().requires_grad_(False)


def build_sides(wanted: Collection[str]) -> tuple[SimpleNamespace, dict[str, nn.Module]]:
    """Ours, and transformers' models by what their weights are (peft, fp32, bf16): the same LoRA, apart or merged; those wanted."""
    model = build_ours()
    peft = add_lora(build_peer(model))
    merged = copy.deepcopy(peft).merge_and_unload()
    load_into(model.text, {name: tensor for name, tensor in merged.state_dict().items() if not name.startswith("encoder.")}, HF_T5, "the peer")
    peers = {"peft": lambda: peft.get_base_model(), "fp32": lambda: merged, "bf16": lambda: copy.deepcopy(merged).bfloat16()}
    return model, {name: build() for name, build in peers.items() if name in wanted}


def memory_of(case: Case, width: int) -> Tensor:
    """Image tokens (B, N, D)."""
    return torch.randn(4, IMAGE_TOKENS, width, generator=torch.Generator().manual_seed(1))[: case.images]


def our_side(case: Case, model: SimpleNamespace) -> Callable[[], Tensor]:
    """A function that returns our ids (rows, T)."""
    memory = memory_of(case, model.text.config.d_model)
    return lambda: case.ours(model, memory, max_new_tokens=NEW_TOKENS, **case.options).view(-1, NEW_TOKENS + 1)


def their_side(case: Case, peer: nn.Module) -> Callable[[], Tensor]:
    """A function that returns the ids of transformers' generate (rows, T)."""
    from transformers.modeling_outputs import BaseModelOutput

    memory = memory_of(case, peer.config.d_model).to(peer.dtype)
    mask = torch.ones(memory.shape[:2], dtype=torch.long)
    # generate writes into the outputs it is given
    return lambda: peer.generate(encoder_outputs=BaseModelOutput(memory), attention_mask=mask, max_new_tokens=NEW_TOKENS, **case.theirs)


def check(id: str, case: Case, exact: bool, ours: Tensor, theirs: Tensor) -> float | None:
    """The share of equal tokens, None where they are drawn. Raises RuntimeError unless both wrote all tokens and, where that is to be, the same ones."""
    if ours.shape != theirs.shape or ours.shape[1] != NEW_TOKENS + 1:
        raise RuntimeError(f"{id}: ids of shape {tuple(ours.shape)} here, {tuple(theirs.shape)} there, and not {NEW_TOKENS} tokens on both")
    if case.drawn:
        return None
    if exact and not torch.equal(ours, theirs):
        raise RuntimeError(f"{id}: the two sides do not write the same tokens")
    return (ours[:, 1:] == theirs[:, 1:]).float().mean().item()


class GivenText:
    """transformers' greedy ids (1, T) and, from its merged weights in fp32, the logits (T, V) after each; what other forms make of these ids."""

    def __init__(self, peer: nn.Module):
        self.ids = their_side(GREEDY, peer)()[:, :-1]
        self.logits = self.their_logits(peer)

    @torch.inference_mode()
    def their_logits(self, peer: nn.Module) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        memory = memory_of(GREEDY, peer.config.d_model).to(peer.dtype)
        return peer(encoder_outputs=BaseModelOutput(memory), decoder_input_ids=self.ids).logits[0].float()

    @torch.inference_mode()
    def our_logits(self, model: SimpleNamespace, rows: int) -> Tensor:
        """Of steps of `rows` equal rows, as the model is prepared for."""
        cache = DecoderCache(model.text, memory_of(GREEDY, model.text.config.d_model), rows, self.ids.shape[1])
        return torch.stack([cache.step(token.expand(rows))[0].float() for token in self.ids.t()])

    def error(self, logits: Tensor) -> float:
        """Relative to fp32."""
        return ((logits - self.logits).norm() / self.logits.norm()).item()


def check_logits(id: str, text: GivenText, model: SimpleNamespace, rows: int, precision: str, peer: nn.Module) -> float:
    """The relative error of our logits. Raises RuntimeError where it is too large; `peer` is in bf16 where ours is."""
    limit = 2 * text.error(text.their_logits(peer)) if precision == "bf16" else {"fp32": 1e-4, "int8": 0.1}[precision]
    error = text.error(text.our_logits(model, rows))
    if not error <= limit:
        raise RuntimeError(f"{id}: our logits in {precision} are off by {error:.2g} of transformers' in fp32, more than {limit:.2g}")
    return error


def check_sampling(id: str, text: GivenText) -> None:
    """Raise RuntimeError unless what is sampled from is what transformers' processors make of the logits of a step."""
    from transformers.generation import logits_process

    chain = [
        logits_process.RepetitionPenaltyLogitsProcessor(SAMPLING["repetition_penalty"]),
        logits_process.TemperatureLogitsWarper(SAMPLING["temperature"]),
        logits_process.TopKLogitsWarper(SAMPLING["top_k"]),
        logits_process.TopPLogitsWarper(SAMPLING["top_p"]),
    ]
    expected = functools.reduce(lambda scores, process: process(text.ids, scores), chain, text.logits[-1:]).softmax(-1)
    difference = (generate.probabilities(text.logits[-1:], text.ids, **SAMPLING) - expected).abs().max().item()
    if not difference <= 1e-5:
        raise RuntimeError(f"{id}: probabilities differ from those of transformers' processors by {difference:.2g}")


def run(pairs: int = 5, only: Collection[str] | None = None, clock: Callable[[], float] | None = None) -> list[dict]:
    """The rows named, or all. clock defaults to wall time with several threads and to this process's CPU seconds with one."""
    only = IDS if only is None else only
    clock = clock or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    timed, rows = {id: entry for id, entry in TIMED.items() if id in only}, []
    if timed:
        model, peers = build_sides({weights for *_, weights in timed.values()} | {"fp32"})
        text = GivenText(peers["fp32"])
        rows = [_timed_row(id, model, peers, text, pairs, clock) for id in timed]
    if "D4" in only:
        measured = {side: [_memory_of_a_process(side) for _ in range(2)] for side in ("ours", "theirs")}
        rows.append(_row("D4", "peak memory above the weights, beam 10, B=4", "transformers", 3.0, "fp32 vs fp32", **measured, unit="bytes"))
    return rows


def _timed_row(id: str, model: SimpleNamespace, peers: dict[str, nn.Module], text: GivenText, pairs: int, clock: Callable[[], float]) -> dict:
    case, must, precision, weights = TIMED[id]
    generate.prepare_for_decoding(model, case.rows, precision)
    error = check_logits(id, text, model, case.rows, precision, peers[weights]) if precision != "fp32" or case.drawn else None
    if case.drawn:
        check_sampling(id, text)
    sides = {"ours": our_side(case, model), "theirs": their_side(case, peers[weights])}
    equal = check(id, case, precision == weights == "fp32", *(side() for side in sides.values()))
    if equal is not None:
        print(f"{id}: {equal:.0%} of the tokens are equal", file=sys.stderr)
    seconds = common.interleave(sides, pairs, warmup=0, clock=clock)
    peer, dtype = ("peft", "fp32") if weights == "peft" else ("transformers", weights)
    more = dict(threads=torch.get_num_threads(), clock=common.clock_name(clock), equal_tokens=equal, logits_error=error)
    return _row(id, case.what, peer, must, f"{precision} vs {dtype}", **seconds, **more)


def _row(id: str, what: str, peer: str, must: float | None, dtype: str, **values) -> dict:
    what = f"{what}, {SIZE}, {IMAGE_TOKENS} image tokens, {NEW_TOKENS} new"
    return common.row(id, what, peer=peer, must=must, dtype=dtype, **values)


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
    if side == "ours":
        generate.prepare_for_decoding(model, rows=BEAM_OF_4.rows)
        works = [our_side(case, model) for case in (GREEDY, BEAM_OF_4)]
    else:
        peer = build_peer(model)
        del model
        works = [their_side(case, peer) for case in (GREEDY, BEAM_OF_4)]
    works[0]()  # what libraries allocate once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    peak, before = PeakMemory(torch.device("cpu")), process_memory("VmRSS")
    works[1]()
    return peak.bytes() - before


def main() -> int:
    parser = common.row_parser(__doc__.split("\n")[0], IDS, pairs=5)
    parser.add_argument("--memory-of", choices=("ours", "theirs"), help="print the bytes of one side of D4, measured in this process")
    arguments = common.parse_rows(parser, IDS)
    if arguments.memory_of:
        print(memory_growth(arguments.memory_of))
        return 0
    common.report(run(arguments.pairs, arguments.only), arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    common.run_main(main)
