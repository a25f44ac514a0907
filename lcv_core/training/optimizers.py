"""Optimizers by name, and their state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lcv_core.errors import InputError
from lcv_core.training.checkpoints import Named, like
from lcv_core.training.recipe import Recipe

Params = Mapping[str, nn.Parameter]


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[Optimizer]:
    """The recipe's optimizer over all parameters of `model` that require gradients.

    Weights of two and more dimensions decay, biases and norms do not. "muon": Muon for the linear layers and
    convolutions of the repeated blocks, AdamW for the rest.
    """
    params = trained(model)
    if not params:
        raise InputError("no parameter requires a gradient: there is nothing to train")
    hidden = _hidden_matrices(model, params) if recipe.optimizer == "muon" else set()
    rest = {name: p for name, p in params.items() if name not in hidden}
    groups = [
        {"params": [p for p in rest.values() if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = []
    if groups:
        # fused: one kernel on a GPU and on a CPU, where the default is a Python loop over tensors.
        fused = all(p.device.type in ("cpu", "cuda") for p in rest.values())
        optimizers.append(
            torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=fused)  # type: ignore[arg-type]
        )
    if hidden:
        matrices = [params[name] for name in params if name in hidden]
        optimizers.append(Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay))
    return optimizers


class Muon(Optimizer):
    """Momentum whose step is made orthogonal (Jordan et al. 2024): a weight [out, ...] counts as a matrix [out, in], so
    that, unlike with torch.optim.Muon, convolutions take part.

    The step is scaled to the root mean square of AdamW's (Liu et al. 2025), 0.2 sqrt(max(out, in)) times the orthogonal
    matrix, so the same lr serves both.
    """

    def __init__(self, params: Sequence[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonal(p.grad.lerp(average, momentum).flatten(1))  # Nesterov's look ahead
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(update.view_as(p), alpha=lr * 0.2 * math.sqrt(max(update.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthogonal rows or columns, singular values within 0.7 to 1.2: five Newton-Schulz
    iterations with the coefficients of Jordan et al., in bf16."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost module lists: a transformer's blocks, a convolutional network's levels."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{block}.") for block in found):
            found |= {f"{name}.{i}": block for i, block in enumerate(module)}
    return found


def _hidden_matrices(model: nn.Module, params: Params) -> set[str]:
    names = set()
    for prefix, block in repeated_blocks(model).items():
        for name, module in block.named_modules():
            weight = f"{prefix}.{name}.weight"
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and weight in params:
                names.add(weight)
    return names


def set_step(optimizers: Sequence[Optimizer], recipe: Recipe, lr: float) -> None:
    """What may change from step to step: the learning rate and, between phases, the decay."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
            if group["weight_decay"]:
                group["weight_decay"] = recipe.weight_decay


def optimizer_state(optimizers: Sequence[Optimizer], params: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the optimizers' state as ("exp_avg/NAME OF PARAMETER", tensor), in a fixed order."""
    names = {id(p): name for name, p in params.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                for key, value in sorted(optimizer.state.get(p, {}).items()):
                    yield f"{key}/{names[id(p)]}", torch.as_tensor(value)


def load_optimizer_state(optimizers: Sequence[Optimizer], params: Mapping[str, Tensor], saved: Named) -> None:
    """The inverse of `optimizer_state`; what is sharded now is sharded again, on however many processes."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in saved:
        kind, _, name = key.partition("/")
        if name in params and value.shape == params[name].shape:
            value = like(value, params[name])
        states.setdefault(name, {})[kind] = value
    names = {id(p): name for name, p in params.items()}
    for optimizer in optimizers:
        data = optimizer.state_dict()
        numbered = [p for group in optimizer.param_groups for p in group["params"]]
        data["state"] = {i: states[names[id(p)]] for i, p in enumerate(numbered) if names[id(p)] in states}
        optimizer.load_state_dict(data)  # knows which of them belong on the parameter's device
