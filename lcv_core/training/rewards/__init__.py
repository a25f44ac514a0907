"""Rewards: callables on a clip and its prompt, in [0, 1]. Built-in ones go by name, anybody's as "module:function"."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor

from lcv_core.errors import InputError
from lcv_core.training.data.grammar import ATTRIBUTES
from lcv_core.training.rewards.pictures import sharpness
from lcv_core.training.rewards.shown import Shown

Reward = Callable[[Tensor, str], float]
"""(frames [F, H, W, 3] float in [0, 1], prompt) -> how good it is, in [0, 1]."""

BUILT_IN: dict[str, Reward] = {
    **{name: Shown((name,)) for name in ATTRIBUTES},
    "prompt": Shown(tuple(ATTRIBUTES)),
    "sharpness": sharpness,
}


@functools.cache
def load_reward(name: str) -> Reward:
    """A built-in reward by its name, or the callable that "module:function" names.

    InputError when there is none. Naming a module runs its code, as any import does.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, separator, function = name.partition(":")
    if not separator:
        raise InputError(f"unknown reward {name!r}; there are {', '.join(BUILT_IN)}, or name yours as module:function")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except AttributeError:
        raise InputError(f"the module {module} has no {function}, which the reward {name} names") from None
    except Exception as error:  # a module may fail in any way
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"the reward {name} cannot be imported ({what}); is its folder on PYTHONPATH?") from error
    if not callable(found):  # a module, a number
        raise InputError(f"the reward {name} is a {type(found).__name__}, not a function of frames and prompt")
    return cast(Reward, found)


def give_rewards(names: Iterable[str], frames: Tensor, prompt: str) -> dict[str, float]:
    """What each of the named rewards gives for a clip. InputError that names the one whose value is not in [0, 1].

    frames: [F, H, W, 3] float in [0, 1], on the CPU.
    """
    rewards = {name: load_reward(name) for name in names}
    judged = {name: reward for name, reward in rewards.items() if isinstance(reward, Shown)}
    values = Shown.together(judged, frames, prompt)  # the clip is measured once for all of them
    for name, reward in rewards.items():
        if name not in judged:
            try:
                values[name] = float(reward(frames, prompt))
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise InputError(f"the reward {name} failed for {prompt!r} ({what})") from error
    for name, value in values.items():
        if not (math.isfinite(value) and -1e-6 <= value <= 1 + 1e-6):
            raise InputError(f"the reward {name} gave {value:g} for {prompt!r}; rewards are in [0, 1]")
    return {name: values[name] for name in rewards}
