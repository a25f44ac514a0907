"""How far outputs are from those of the same weights in a wider dtype: bf16 from fp32, fp32 from fp64."""

from __future__ import annotations

from pathlib import Path

import official
import torch
from parts import FORMS, PLAIN, Absent, Inputs, Job, Ours, build, build_quantised
from torch import Tensor

from lcv_core.config import DiTConfig


def compare(
    config: DiTConfig, job: Job, device: torch.device, dtype: torch.dtype, path: Path | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Velocities by who made them: "exact", "ours", "official", and each eight-bit form; and why others are missing."""
    missing: dict[str, str] = {}
    inputs = Inputs.of(config, job, device, dtype)
    model = build(config, device, dtype)
    found = {"ours": Ours(model, job, inputs).forward().double().cpu()}
    try:
        if path is None:
            raise Absent("no --official PATH was given")
        official.load(path)
        other = official.build(model, device, dtype)
        found["official"] = official.Official(other, config, job, inputs).forward().double().cpu()
    except Absent as why:
        missing["official"] = str(why)
    found["exact"] = _exact(config, job, inputs, model.state_dict(), dtype)
    del model
    for form in FORMS:
        try:
            quantised = build_quantised(config, device, dtype, form)
        except Absent as why:
            missing[form] = str(why)
        else:
            found[form] = Ours(quantised, job, inputs, form).forward().double().cpu()
    return {PLAIN if name == "ours" else name: x for name, x in found.items()}, missing


def _exact(
    config: DiTConfig, job: Job, inputs: Inputs, state: dict[str, Tensor], dtype: torch.dtype
) -> Tensor:  # fmt: skip
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    model = build(config, inputs.latents.device, wide)
    model.load_state_dict({name: x.to(wide) for name, x in state.items()})
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # ten bits of mantissa would be no fp32
    try:
        return Ours(model, job, inputs).forward().double().cpu()
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def noise_ratio(x: Tensor, exact: Tensor) -> float:
    return ((x - exact).norm() / exact.norm()).item()


def psnr(x: Tensor, exact: Tensor) -> float:
    """10 log10(range^2 / mean squared error), dB."""
    return (10 * torch.log10((exact.max() - exact.min()).square() / (x - exact).square().mean())).item()
