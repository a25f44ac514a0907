"""The correctness gate: no timing is worth printing when the numbers are wrong."""

from __future__ import annotations

import torch
from measure import ROOT, Setting
from torch import Tensor

GOLDEN = ROOT / "tests" / "parity" / "golden"


def check(setting: Setting) -> list[str] | None:
    """Compare DiT and VAE with the official model's outputs on this device, in this dtype.

    The failures, one line each; None where the checkout has no golden vectors.
    """
    if not (GOLDEN / "dit_cases.safetensors").is_file():
        return None
    with torch.no_grad():
        errors = _dit_errors(setting) | _vae_errors(setting)
    limits = _limits(setting)
    return [
        f"{name}: relative error {error:.2g}, allowed {limits[name.split()[0]]:g}"
        for name, error in errors.items()
        if not error <= limits[name.split()[0]]  # NaN fails too
    ]


def _limits(setting: Setting) -> dict[str, float]:
    if setting.dtype != torch.float32:
        return {"dit": 2e-2, "vae": 5e-2}
    # On a GPU torch lets cuDNN convolutions (patch embedding and VAE) use TF32, 10 bits of mantissa.
    return {"dit": 1e-5, "vae": 1e-5} if setting.device.type == "cpu" else {"dit": 2e-3, "vae": 5e-3}


def _load(name: str, setting: Setting) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {key: value.to(setting.device) for key, value in load_file(GOLDEN / f"{name}.safetensors").items()}


def _relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def _dit_errors(setting: Setting) -> dict[str, float]:
    """A plain forward, one with a KV cache, block sparse attention that keeps all blocks and, in fp32, a quarter of
    them (in half precision near-ties may choose other blocks than the golden run)."""
    from lcv_core.config import BSAConfig, DiTConfig
    from lcv_core.dit.model import LongCatDiT

    dit = LongCatDiT(DiTConfig.from_json(GOLDEN / "dit_config.json"), device=setting.device)
    dit.load_state_dict(_load("dit_weights", setting))
    dit.to(setting.dtype)
    dit.set_attention(setting.attention)
    c = _load("dit_cases", setting)
    # Timesteps are rounded to the dtype of the weights, in bf16 by so much that it has golden outputs of its own.
    out = _load("dit_cases_bf16", setting) if setting.dtype == torch.bfloat16 else c
    text, mask, t = c["in.y"], c["in.mask"], c["in.t1"]
    cache = dit.build_kv_cache(c["in.cond"])
    got = {
        "a": dit(c["in.x"], t, text, mask),
        "c": dit(c["in.xs"][:, :, 4:], t, text, mask, num_cond_latents=4, kv_cache=cache),
    }
    half = t.new_full((1,), 500.0)
    sparsities = {"d_sparsity0": 0.0} | ({"d": 0.75} if setting.dtype == torch.float32 else {})
    for name, sparsity in sparsities.items():
        got[name] = dit(c["in.xb"], half, text[:1], mask[:1], bsa=BSAConfig(sparsity=sparsity))
    return {f"dit {name}": _relative(value, out[f"out.{name}"]) for name, value in got.items()}


def _vae_errors(setting: Setting) -> dict[str, float]:
    from lcv_core.config import VAEConfig
    from lcv_core.vae.model import WanVAE

    g = _load("vae", setting)
    vae = WanVAE(VAEConfig(base_dim=4), device=setting.device)
    vae.load_state_dict({key[2:]: value for key, value in g.items() if key.startswith("w.")})
    vae.to(setting.dtype)
    mean, _ = vae.encode(g["in.px"])
    return {
        "vae encode": _relative(mean, g["out.mean"]),
        "vae decode": _relative(vae.decode(g["out.mean"]), g["out.dec_of_mean"]),
    }
