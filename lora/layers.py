"""`LoRALinear`: a frozen nn.Linear with a trained low-rank update beside it (LoRA with alpha / rank, arXiv
2106.09685; rsLoRA with alpha / sqrt(rank), arXiv 2312.03732).

Legend: R rank.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.functional import Adapter, lora_linears, lora_projections
from lora.masks import DropoutStream
from lora.quant import Linear4bit, compute_dtype

INITS = ("gaussian", "kaiming")


class LoRALinear(nn.Module):
    """y = base(x) + scaling * dropout(x) A^T B^T, with scaling = alpha / sqrt(rank), or alpha / rank without rslora.

    base is kept as it is and frozen. A (R, in) is normal with standard deviation 1/R (`gaussian`) or PEFT's default
    (`kaiming`), B (out, R) is zero: the first output is base's own. A and B are fp32 even beside a bf16 base. train()
    and eval() switch dropout and touch no weight; `merge` and `unmerge` are explicit, and while merged the update
    lies in base.weight and forward is base alone. Beside a 4-bit base (QLoRA, arXiv 2305.14314) the update is added to
    the base's output and can not be merged. Raises ValueError on rank < 1, dropout outside [0, 1), an unknown init, or
    a base that is neither nn.Linear nor Linear4bit.
    """

    def __init__(
        self,
        base: nn.Linear | Linear4bit,
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.1,
        init: str = "gaussian",
        generator: torch.Generator | None = None,
        rslora: bool = True,
    ):
        super().__init__()
        if not isinstance(base, nn.Linear | Linear4bit):
            raise ValueError(f"LoRA goes on nn.Linear or Linear4bit, not on {type(base).__name__}")
        check_settings(rank, alpha, dropout, init)
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.dropout, self.init, self.rslora = rank, alpha, dropout, init, rslora
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        # Of dropout: shared by the layers of a model, which are told apart by their numbers.
        self.stream, self.stream_number = DropoutStream(), 0
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=base.weight.device))
        self.register_buffer("unmerged_weight", None, persistent=False)
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        if self.merged:
            return self.base(x)
        if isinstance(self.base, Linear4bit):
            x = x.to(compute_dtype(x))
            return self.base(x) + F.linear(LoRALinear.projected(x, [self])[0], self.lora_B.to(x.dtype))
        return LoRALinear.project(x, [self])[0]

    @staticmethod
    def project(x: Tensor, layers: Sequence["LoRALinear"]) -> list[Tensor]:
        """The outputs of several layers that read the same input, in one pass where they are alike: x (..., in) → (..., out) each."""
        first = layers[0]
        if not LoRALinear.alike(layers) or any(layer.merged or isinstance(layer.base, Linear4bit) for layer in layers):
            return [layer(x) for layer in layers]
        weights, biases = [layer.base.weight for layer in layers], [layer.base.bias for layer in layers]
        return lora_linears(x, weights, biases, [layer.adapter for layer in layers], first.dropout, first.dropout_state(x))

    @staticmethod
    def alike(layers: Sequence["LoRALinear"]) -> bool:
        """Whether one call can draw the masks of all."""
        return len({(layer.dropout, layer.training, id(layer.stream)) for layer in layers}) == 1

    @staticmethod
    def parts(x: Tensor, layers: Sequence["LoRALinear"]) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """For each layer (W, Z, F) with forward(x) = x W^T + Z F^T (+ bias), Z (..., R), F (out, R), for callers that never form it.

        While merged, Z and F are None.
        """
        weights = [layer.base.dequantized(x.dtype) if isinstance(layer.base, Linear4bit) else layer.base.weight for layer in layers]
        if not LoRALinear.alike(layers) or any(layer.merged for layer in layers):
            return [LoRALinear.parts(x, [layer])[0] for layer in layers] if len(layers) > 1 else [(weights[0], None, None)]
        projections = LoRALinear.projected(x, layers)
        return [(weight, Z, layer.lora_B.to(Z.dtype)) for weight, Z, layer in zip(weights, projections, layers)]

    @property
    def adapter(self) -> Adapter:
        """What `lora_linears` takes of it."""
        return Adapter(self.lora_A, self.lora_B, self.scaling, self.stream_number)

    @staticmethod
    def projected(x: Tensor, layers: Sequence["LoRALinear"]) -> list[Tensor]:
        """scaling * dropout(x) A^T of each layer: (..., in) → (..., R)."""
        return lora_projections(x, [layer.adapter for layer in layers], layers[0].dropout, layers[0].dropout_state(x))

    def dropout_state(self, x: Tensor) -> Tensor | None:
        """What masks are drawn from in training, else None."""
        return self.stream.state(x.device) if self.training and self.dropout else None

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Its own parameters by name, without base's."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling * B A (out, in), in the dtype of A and B."""
        return self.scaling * (self.lora_B @ self.lora_A)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to base.weight, rounding once; the old weight is kept for `unmerge`. Does nothing if merged
        already. Raises ValueError on a 4-bit base.
        """
        if self.merged:
            return
        if isinstance(self.base, Linear4bit):
            raise ValueError(
                "LoRA is not merged into a 4-bit base: rounding W + scaling * B A to 16 levels loses most of a small update; "
                "keep LoRA beside the base, or dequantize_base(model) first and merge in full precision"
            )
        self.unmerged_weight = self.base.weight.detach().clone()
        self.base.weight.copy_(self.base.weight.to(self.lora_A.dtype) + self.delta_weight())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put base.weight back, bit for bit. Does nothing if not merged."""
        if not self.merged:
            return
        self.base.weight.copy_(self.unmerged_weight)
        self.unmerged_weight = None

    def extra_repr(self) -> str:
        scale = f"alpha={self.alpha:g}, scaling={self.scaling:g}"
        return f"rank={self.rank}, {scale}, dropout={self.dropout:g}, merged={self.merged}"


def check_settings(rank: int, alpha: float, dropout: float, init: str) -> None:
    """Raises ValueError, in one line, on settings that no LoRALinear can have."""
    if rank < 1:
        raise ValueError(f"LoRA rank must be at least 1, not {rank}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"LoRA alpha must be above 0 and finite, not {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA dropout must be at least 0 and below 1, not {dropout}")
    if init not in INITS:
        raise ValueError(f"unknown LoRA init {init!r}: one of {', '.join(INITS)}")
