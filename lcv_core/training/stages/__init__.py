"""The stages, one file each, by the name that recipes call them."""

from __future__ import annotations

import importlib

from lcv_core.errors import InputError
from lcv_core.training.recipe import Recipe
from lcv_core.training.stage import Stage

STAGES = {
    "vae": "lcv_core.training.stages.vae:VAEStage",
    "text": "lcv_core.training.stages.text:TextStage",
    "flow": "lcv_core.training.stages.flow:FlowStage",
    "lora": "lcv_core.training.stages.lora:LoRAStage",
    "refine": "lcv_core.training.stages.refine:RefineStage",
    "distill": "lcv_core.training.stages.distill:DistillStage",
    "grpo": "lcv_core.training.stages.grpo:GRPOStage",
}


def build_stage(recipe: Recipe) -> Stage:
    """The stage that a recipe names, checked and ready for the trainer; InputError for an unknown name."""
    if recipe.stage not in STAGES:
        raise InputError(f"unknown stage {recipe.stage!r}; there are: {', '.join(STAGES)}")
    module, name = STAGES[recipe.stage].split(":")
    return getattr(importlib.import_module(module), name)(recipe)
