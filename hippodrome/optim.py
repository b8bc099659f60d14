"""The optimiser: AdamW with the rules that parts declare for their parameters, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from hippodrome.part import BadInput, OptimRule, Part, nearest
from hippodrome.run import TrainConfig


def rules(model: nn.Module) -> dict[str, OptimRule]:
    """The rule of every parameter that has one, by its name in the model. A rule for no parameter raises `BadInput`."""
    found: dict[str, OptimRule] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, Part):
            continue
        known = dict(cast(nn.Module, module).named_parameters())
        for name, rule in module.optim_rules.items():
            if name not in known:
                part = type(module).__name__
                raise BadInput(f"{part}.optim_rules names {name!r}, which is none of its parameters: {nearest(name, known)}")
            found[f"{prefix}.{name}" if prefix else name] = rule
    return found


def param_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups of parameters that share a peak learning rate (`peak`) and a weight decay.

    Weight decay applies to matrices or to everything, as the config says; a part's rule comes first.
    """
    ruled = rules(model)
    by_identity = {id(model.get_parameter(name)): rule for name, rule in ruled.items()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        rule = by_identity.get(id(parameter), OptimRule())
        decays = config.decay == "all" or parameter.dim() >= 2
        decay = (config.weight_decay if decays else 0.0) if rule.weight_decay is None else rule.weight_decay
        peak = config.lr * rule.lr_scale
        groups.setdefault((peak if rule.lr_max is None else min(peak, rule.lr_max), decay), []).append(parameter)
    return [
        {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay} for (peak, decay), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over `param_groups`. For a CUDA graph its rates are tensors, which the replayed step reads anew each time."""
    groups = param_groups(model, config)
    if config.cuda_graph:
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
    fused = not any(parameter.is_complex() for parameter in model.parameters())
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), fused=fused, capturable=config.cuda_graph)


def schedule(config: TrainConfig, step: int) -> float:
    """The share of the peak learning rate at step 0, 1, ...: a linear rise, then the config's fall to `lr_final`."""
    rise = round(config.warmup * config.steps)
    if step < rise:
        return (step + 1) / rise
    if config.schedule == "constant":
        return 1.0
    done = (step - rise) / max(1, config.steps - rise)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr_final + (1 - config.lr_final) * left


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group this share of its peak learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["peak"] * share)
        else:
            group["lr"] = group["peak"] * share
