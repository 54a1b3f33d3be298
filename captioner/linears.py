"""How a layer may stand in for nn.Linear and still be computed together with its neighbours. A layer that wraps an nn.Linear may have

- `project(x, layers)`, a static method: the outputs of several layers of its kind on one input, in one pass;
- `parts(x, layers)`, a static method: for each (W, Z, F) with layer(x) = x W^T + Z F^T, for callers that never form the output.
"""

from torch import Tensor, nn


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """[layer(x) for layer in layers], in one pass where the layers know how: x (..., D) → (..., D_i) each."""
    kind = type(layers[0])
    if hasattr(kind, "project") and all(type(layer) is kind for layer in layers):
        return kind.project(x, layers)
    return [layer(x) for layer in layers]


def parts(x: Tensor, *layers: nn.Module) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """(W, Z, F) of each layer with layer(x) = x W^T + Z F^T; Z and F are None for nn.Linear. In one pass where the layers know how."""
    kind = type(layers[0])
    if hasattr(kind, "parts") and all(type(layer) is kind for layer in layers):
        return kind.parts(x, layers)
    return [(layer.weight, None, None) if isinstance(layer, nn.Linear) else type(layer).parts(x, [layer])[0] for layer in layers]
