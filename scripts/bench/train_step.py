"""One training step of the LoRA decoder against transformers + peft, fp32 against fp32 on the CPU.

    python scripts/bench/train_step.py [--pairs 7] [--images 32] [--json PATH|-]

Flan-T5-base decoder with random weights, 32 images of 197 frozen tokens, captions of 20 tokens. Both sides: a trained
linear bridge, rsLoRA of rank 8 with dropout 0.1 on all attention and feed-forward layers of the decoder, T5's own
dropout 0.1, cross-entropy, clipping at 1.0, fused AdamW, the same weights. Their losses are compared in eval mode and
their step is checked to train, before anything is timed.
"""

import sys
import time
from collections.abc import Callable

import common
import torch
from torch import Tensor, nn

import lora
from captioner.model import Captioner
from captioner.t5 import T5, T5Config
from captioner.weights import hf_module_name, t5_to_hf

IMAGES, IMAGE_TOKENS, TEXT_TOKENS = 32, 197, 20
RANK, ALPHA, DROPOUT = 8, 8.0, 0.1
PACKAGES = ("torch", "transformers", "peft")


class Features(nn.Module):
    """Stands where the image encoder would: its tokens are given."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width


def build_ours(size: str) -> tuple[Captioner, dict[str, nn.Parameter]]:
    """A captioner with LoRA of random, non-zero B, and its trained parameters."""
    config = T5Config.from_name(size)
    config.num_layers = 0
    model = Captioner(Features(config.d_model), T5(config))
    lora.apply_lora(model, ("attn", "ffn"), ("decoder",), RANK, ALPHA, DROPOUT)
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


def make_step(
    compute_loss: Callable[[Tensor, Tensor], Tensor], parameters: list[nn.Parameter], features: Tensor, labels: Tensor
) -> Callable[[], float]:
    """A function that does one training step and returns its loss."""
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.0, fused=True)

    def step() -> float:
        loss = compute_loss(features, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def run(
    pairs: int = 7, images: int = IMAGES, size: str = "flan-t5-base", clock: Callable[[], float] | None = None
) -> list[dict]:
    """The row C2. clock defaults to wall time with several threads and to this process's CPU seconds with one."""
    from transformers.modeling_outputs import BaseModelOutput

    torch.manual_seed(0)
    model, trainable = build_ours(size)
    peer = build_peer(model)
    peer_trainable = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    if sum(p.numel() for p in peer_trainable) != sum(p.numel() for p in trainable.values()):
        raise RuntimeError("the two sides train different numbers of parameters")
    features = torch.randn(images, IMAGE_TOKENS, model.text.config.d_model)
    labels = torch.randint(2, model.text.config.vocab_size, (images, TEXT_TOKENS))

    def our_loss(features: Tensor, labels: Tensor) -> Tensor:
        total, count = model.loss(model.bridge(features), labels)
        return total / count

    def peer_loss(features: Tensor, labels: Tensor) -> Tensor:
        return peer(encoder_outputs=BaseModelOutput(last_hidden_state=peer.bridge(features)), labels=labels).loss

    model.eval()
    peer.eval()
    with torch.no_grad():
        ours, theirs = our_loss(features, labels).item(), peer_loss(features, labels).item()
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        raise RuntimeError(f"the two sides do not compute the same: loss {ours} here, {theirs} there")
    model.train()
    peer.train()
    steps = {
        "ours": make_step(our_loss, list(trainable.values()), features, labels),
        "peer": make_step(peer_loss, peer_trainable, features, labels),
    }
    for name, step in steps.items():
        first, _, third = step(), step(), step()
        if not third < first:
            raise RuntimeError(f"{name}: three steps on one batch took the loss from {first} to {third}")
    clock = clock or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    seconds = common.interleave(steps, pairs, clock=clock)
    return [
        common.row(
            "C2",
            f"LoRA training step, {size} decoder, B={images}, {IMAGE_TOKENS} image tokens, T={TEXT_TOKENS}",
            ours=seconds["ours"],
            theirs=seconds["peer"],
            peer="peft",
            must=1.4,
            dtype="fp32 vs fp32",
            threads=torch.get_num_threads(),
            clock="cpu seconds" if clock is time.process_time else "wall seconds",
            loss_difference=abs(ours - theirs),
        )
    ]


def main() -> int:
    parser = common.argument_parser(__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, metavar="N", help="interleaved pairs of steps (default 7)")
    parser.add_argument("--images", type=int, default=IMAGES, metavar="B", help=f"images a step (default {IMAGES})")
    parser.add_argument("--size", default="flan-t5-base", help="a row of captioner.t5.SIZES (default flan-t5-base)")
    arguments = parser.parse_args()
    common.report(run(arguments.pairs, arguments.images, arguments.size), arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
