"""One training step of the LoRA decoder against transformers + peft.

    python scripts/bench/train_step.py [--only ID,ID] [--pairs 7] [--images N] [--json PATH|-]

A decoder with random weights, images of 197 frozen tokens, captions of 20 tokens. Both sides: a trained linear bridge, rsLoRA of rank 8 with dropout 0.1
on all attention and feed-forward layers of the decoder, T5's own dropout 0.1, cross-entropy, clipping at 1.0, fused AdamW, the same weights. Their
losses are compared in eval mode and their step is checked to train, before anything is timed.

Ours in bf16 is what `train.py --precision bf16` does: frozen weights in bf16 under autocast, trained ones in fp32; on CUDA also --cuda-graphs. Theirs:
fp32; bf16, all of it, adapters too, which is faster than peft's default; default, a bf16 base with peft's fp32 adapters; compiled, as bf16 and
through torch.compile. Rows C are measured on the CPU, rows T on CUDA.
"""

import itertools
import time
from collections.abc import Callable, Collection

import common
import torch
from torch import Tensor, nn

import lora
from captioner.cli import keep_freed_memory
from captioner.model import Captioner
from captioner.runtime import cast_frozen
from captioner.t5 import T5, T5Config
from captioner.weights import hf_module_name, t5_to_hf
from train import lay_out

IMAGE_TOKENS, TEXT_TOKENS = 197, 20
RANK, ALPHA, DROPOUT = 8, 8.0, 0.1
PACKAGES = ("torch", "transformers", "peft")
# Device, decoder, our precision, the peer's form, must.
ROWS = {
    "C1": ("cpu", "flan-t5-base", "bf16", "fp32", 3.0),
    "C1-bf16": ("cpu", "flan-t5-base", "bf16", "bf16", 1.8),
    "C2": ("cpu", "flan-t5-base", "fp32", "fp32", 1.5),
    "T1": ("cuda", "flan-t5-base", "bf16", "default", 5.0),
    "T1-bf16": ("cuda", "flan-t5-base", "bf16", "bf16", None),
    "T2": ("cuda", "flan-t5-base", "bf16", "compiled", 1.4),
    "T3": ("cuda", "flan-t5-large", "bf16", "default", 3.0),
    "T3-compiled": ("cuda", "flan-t5-large", "bf16", "compiled", 1.3),
}
IDS = tuple(ROWS)
CUDA_IDS = tuple(id for id, row in ROWS.items() if row[0] == "cuda")
IMAGES = {"cpu": 32, "cuda": 128}


class Features(nn.Module):
    """Stands where the image encoder would: its tokens are given."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width


def build_ours(size: str, rank: int = RANK) -> tuple[Captioner, dict[str, nn.Parameter]]:
    """A captioner with LoRA of random, non-zero B, and its trained parameters."""
    config = T5Config.from_name(size)
    config.num_layers = 0
    model = Captioner(Features(config.d_model), T5(config))
    lora.apply_lora(model, ("attn", "ffn"), ("decoder",), rank, ALPHA, DROPOUT)
    trainable = lora.set_trainable(model, also=("bridge",))
    with torch.no_grad():
        for name, parameter in lora.adapter_parameters(model).items():
            if name.endswith("lora_B"):
                parameter.normal_(std=1e-3)
    return model, trainable


def build_peer(model: Captioner) -> nn.Module:
    """transformers + peft with the weights of our model; `bridge` is an attribute of the result."""
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()
    config = model.text.config
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_decoder_layers", "num_heads", "feed_forward_proj")
    sizes += ("tie_word_embeddings", "dropout_rate", "decoder_start_token_id")
    settings = {name: getattr(config, name) for name in sizes}
    peer = transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=1, **settings))
    if not config.tie_word_embeddings:
        # transformers 5 ties the head of every T5 that is made from a config; only a checkpoint unties it.
        peer.lm_head.weight = nn.Parameter(torch.empty_like(peer.lm_head.weight))
    adapters = set(lora.adapter_parameters(model.text))
    base = {
        name.replace(".base.", "."): tensor for name, tensor in model.text.state_dict().items() if name not in adapters
    }
    missing, unexpected = peer.load_state_dict(t5_to_hf(base, config), strict=False)
    if unexpected or any(not name.startswith(("encoder.", "decoder.embed_tokens.")) for name in missing):
        raise RuntimeError(f"the peer's weights do not fit: missing {missing}, unexpected {unexpected}")
    names = {
        hf_module_name(name.rpartition(".")[0]): name
        for name in lora.adapter_parameters(model)
        if name.endswith("lora_A")
    }
    settings = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        use_rslora=True,
        target_modules=list(names),
        task_type="SEQ_2_SEQ_LM",
    )
    peer = get_peft_model(peer, settings)
    parameters = dict(peer.named_parameters())
    with torch.no_grad():
        for donor, name in names.items():
            module = model.get_submodule(name.rpartition(".")[0])
            parameters[f"base_model.model.{donor}.lora_A.default.weight"].copy_(module.lora_A)
            parameters[f"base_model.model.{donor}.lora_B.default.weight"].copy_(module.lora_B)
    peer.bridge = nn.Linear(config.d_model, config.d_model)
    peer.bridge.load_state_dict(model.bridge.state_dict())
    return peer


def update(
    compute_loss: Callable[[Tensor, Tensor], Tensor], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, features: Tensor, labels: Tensor
) -> Tensor:
    """One training step; its loss, for which nothing waits."""
    loss = compute_loss(features, labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def make_step(
    compute_loss: Callable[[Tensor, Tensor], Tensor], parameters: list[nn.Parameter], features: Tensor, labels: Tensor
) -> Callable[[], float]:
    """A function that does one training step and returns its loss, so that it ends with the device at rest."""
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.0, fused=True)
    return lambda: update(compute_loss, parameters, optimizer, features, labels).item()


def make_graphed_step(model: Captioner, compute_loss, parameters: list[nn.Parameter], features: Tensor, labels: Tensor) -> Callable[[], float]:
    """`make_step` as `train.py --cuda-graphs` does it."""
    from captioner.cuda_graphs import Recorder, StepGraphs

    lr = torch.tensor(5e-4, device=features.device)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True, capturable=True)

    def work(inputs: list[dict[str, Tensor]]) -> tuple[Tensor]:
        return (update(compute_loss, parameters, optimizer, inputs[0]["features"], inputs[0]["labels"]),)

    graphs = StepGraphs(work, Recorder(features.device), lambda inputs: True)
    numbers = itertools.count()

    def step() -> float:
        lora.seed_dropout(model, 0, next(numbers))
        return graphs([{"features": features, "labels": labels}])[0].item()

    return step


def prepare(model: Captioner, trainable: dict[str, nn.Parameter], precision: str) -> None:
    """As train.py does before its first step."""
    if precision == "bf16":
        cast_frozen(model.text, torch.bfloat16, keep=trainable.values())
    lay_out(model)


def prepare_peer(peer: nn.Module, form: str) -> torch.dtype:
    """Bring transformers + peft into a form of ROWS; the dtype of its image features."""
    if form == "fp32":
        return torch.float32
    for name, parameter in peer.named_parameters():
        if form != "default" or not parameter.requires_grad or name.startswith("bridge."):
            parameter.data = parameter.data.to(torch.bfloat16)
    if form == "compiled":
        peer.forward = torch.compile(peer.forward, mode="reduce-overhead")
    return torch.bfloat16


def run(pairs: int = 7, images: int | None = None, only: Collection[str] | None = None, clock: Callable[[], float] | None = None) -> list[dict]:
    """The rows named, or all that this machine can measure. clock defaults to wall time, on a CPU with one thread to this process's CPU seconds."""
    keep_freed_memory()
    ids = [id for id in ROWS if (id in only if only is not None else id not in CUDA_IDS or torch.cuda.is_available())]
    if not torch.cuda.is_available() and (impossible := [id for id in ids if id in CUDA_IDS]):
        raise RuntimeError(f"{', '.join(impossible)}: needs a CUDA device")
    rows = []
    for device, size in dict.fromkeys(ROWS[id][:2] for id in ids):
        chosen = {id: ROWS[id][2:] for id in ids if ROWS[id][:2] == (device, size)}
        steps, losses = build_steps(size, device, images or IMAGES[device], chosen)
        check(steps, losses)
        single = device == "cpu" and torch.get_num_threads() == 1
        used = clock or (time.process_time if single else time.perf_counter)
        seconds = common.interleave(steps, pairs, clock=used)
        what = f"LoRA training step, {size} decoder, B={images or IMAGES[device]}, {IMAGE_TOKENS} image tokens, T={TEXT_TOKENS}"
        details = dict(threads=torch.get_num_threads(), clock=common.clock_name(used), peer="peft", device=device)
        for id, (ours, theirs, must) in chosen.items():
            both = dict(ours=seconds["ours", ours], theirs=seconds["peer", theirs], losses=[losses["ours", ours], losses["peer", theirs]])
            rows.append(common.row(id, what, must=must, dtype=f"{ours} vs {theirs}", **both, **details))
    return rows


def build_steps(size: str, device: str, images: int, rows: dict[str, tuple]) -> tuple[dict, dict]:
    """By (side, form): the training step, and the loss of the first batch without dropout."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, IMAGE_TOKENS, T5Config.from_name(size).d_model, generator=generator).to(device)
    labels = torch.randint(2, T5Config.from_name(size).vocab_size, (images, TEXT_TOKENS), generator=generator).to(device)
    steps, losses = {}, {}
    for form in sorted({row[1] for row in rows.values()} | {row[0] for row in rows.values()}):
        torch.manual_seed(0)
        model, trainable = build_ours(size)
        if any(row[1] == form for row in rows.values()):
            peer = build_peer(model).to(device)
            compute = peer_loss(peer, prepare_peer(peer, form))
            losses["peer", form] = eval_loss(peer, compute, features, labels)
            steps["peer", form] = make_step(compute, [p for p in peer.parameters() if p.requires_grad], features, labels)
        if any(row[0] == form for row in rows.values()):
            model.to(device)
            prepare(model, trainable, form)
            compute, parameters = our_loss(model, form), list(trainable.values())
            losses["ours", form] = eval_loss(model, compute, features, labels)
            arguments = compute, parameters, features, labels
            steps["ours", form] = make_graphed_step(model, *arguments) if device == "cuda" else make_step(*arguments)
    return steps, losses


def check(steps: dict, losses: dict) -> None:
    """Raise RuntimeError unless both sides compute the same loss and their steps train."""
    exact = losses.get(("ours", "fp32"), next(iter(losses.values())))
    for (side, form), loss in losses.items():
        if abs(loss - exact) > (1e-4 if form == "fp32" else 2e-2) * abs(exact):
            raise RuntimeError(f"the two sides do not compute the same: loss {loss} of {side} in {form}, {exact} elsewhere")
    for name, step in steps.items():
        first, *_, last = [step() for _ in range(6)]
        if not last < first:
            raise RuntimeError(f"{name}: six steps on one batch took the loss from {first} to {last}")


def eval_loss(module: nn.Module, compute: Callable[[Tensor, Tensor], Tensor], features: Tensor, labels: Tensor) -> float:
    """The loss without dropout; the module is left in training mode."""
    module.eval()
    with torch.no_grad():
        loss = compute(features, labels).item()
    module.train()
    return loss


def our_loss(model: Captioner, precision: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean loss of features and labels."""

    def compute(features: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(features.device.type, torch.bfloat16, enabled=precision == "bf16"):
            total, count = model.loss(model.bridge(features), labels)
        return total / count

    return compute


def peer_loss(peer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """The same of transformers."""
    from transformers.modeling_outputs import BaseModelOutput

    def compute(features: Tensor, labels: Tensor) -> Tensor:
        return peer(encoder_outputs=BaseModelOutput(last_hidden_state=peer.bridge(features.to(dtype))), labels=labels).loss

    return compute


def main() -> int:
    parser = common.row_parser(__doc__.split("\n")[0], IDS, pairs=7)
    parser.add_argument("--images", type=int, metavar="B", help=f"images a step (default {IMAGES['cpu']} on a CPU, {IMAGES['cuda']} on CUDA)")
    arguments = common.parse_rows(parser, IDS)
    common.report(run(arguments.pairs, arguments.images, arguments.only), arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    common.run_main(main)
