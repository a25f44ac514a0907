"""Text to video, image to video and continuation: batches, seeds, inputs of every kind, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import FakeTextEncoder, components, make_dit, pictures, randn, seeded, text
from torch import Tensor

from lcv_core import schedule
from lcv_core.config import Native
from lcv_core.denoise import StepInfo
from lcv_core.errors import InputError
from lcv_core.pipelines import Components, continue_video, image_to_video, text_to_video
from lcv_core.pipelines.base import draw_noise, encode_frames, prepare_frames
from lcv_core.text.encoder import TextStates
from lcv_core.vae.tiling import Tiling

SAME = 1e-5


@pytest.fixture(scope="module")
def c() -> Components:
    return components(text_encoder=FakeTextEncoder())


def t2v(c: Components, **changes: Any) -> Tensor:
    options = {"text": text(), "negative_text": text(seed=9), "num_steps": 2, "output": "latents"} | changes
    return text_to_video(c, **options)


def i2v(c: Components, **changes: Any) -> Tensor:
    options = {"text": text(), "negative_text": text(seed=9), "num_steps": 2, "output": "latents",
               "image": pictures(1)[0]} | changes  # fmt: skip
    return image_to_video(c, **options)


def vc(c: Components, **changes: Any) -> Tensor:
    options = {"text": text(), "negative_text": text(seed=9), "num_steps": 2, "output": "latents",
               "frames": pictures(7), "uniform_tail": False} | changes  # fmt: skip
    return continue_video(c, **options)


TASKS = [t2v, i2v, vc]


def close(a: Tensor, b: Tensor, tolerance: float = SAME) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


@pytest.mark.parametrize("task", TASKS)
def test_the_native_job_is_the_default(c: Components, task: Any) -> None:
    assert task(c, generator=seeded()).shape == (1, 16, 3, 4, 6)
    frames = task(c, output="frames", generator=seeded())
    assert frames.shape == (1, 9, 32, 48, 3) and frames.dtype == torch.float32
    assert frames.min() >= 0 and frames.max() <= 1 and frames.std() > 0.05


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_batch_is_its_single_runs(c: Components, task: Any, mode: str) -> None:
    """Two prompts with two negatives, a generator for each video: video i is the run of prompt i alone."""
    positive, negative = text(2), text(2, seed=9)
    batch = task(c, text=positive, negative_text=negative, generator=[seeded(1), seeded(2)], cfg_mode=mode)
    for i in range(2):
        alone = task(c, text=positive.select(i), negative_text=negative.select(i), generator=seeded(i + 1))
        assert close(batch[i : i + 1], alone)
    assert not close(batch[:1], batch[1:], 0.01)


@pytest.mark.parametrize("task", TASKS)
def test_several_videos_per_prompt(c: Components, task: Any) -> None:
    """Prompts a, b and two videos each come as a, a, b, b; negatives go with their prompts."""
    positive, negative = text(2), text(2, seed=9)
    generators = [seeded(i) for i in range(4)]
    batch = task(c, text=positive, negative_text=negative, num_videos_per_prompt=2, generator=generators)
    assert batch.shape[0] == 4
    for i in range(4):
        alone = task(c, text=positive.select(i // 2), negative_text=negative.select(i // 2), generator=seeded(i))
        assert close(batch[i : i + 1], alone)


@pytest.mark.parametrize("task", TASKS)
def test_with_one_generator_the_first_video_is_the_single_run(c: Components, task: Any) -> None:
    batch = task(c, num_videos_per_prompt=3, generator=seeded(5))
    assert close(batch[:1], task(c, generator=seeded(5)))
    assert not close(batch[:1], batch[1:2], 0.01)


@pytest.mark.parametrize("task", TASKS)
def test_one_negative_for_all(c: Components, task: Any) -> None:
    noise = randn(2, 16, 3, 4, 6)
    one = task(c, text=text(2), negative_text=text(seed=9), noise=noise)
    states = text(seed=9)
    assert torch.equal(one, task(c, text=text(2), negative_text=states.repeat(2), noise=noise))


@pytest.mark.parametrize("task", TASKS)
def test_counts_that_do_not_match(c: Components, task: Any) -> None:
    with pytest.raises(InputError, match="negative_text has 3 entries for 2 prompts; give one, or one per prompt"):
        task(c, text=text(2), negative_text=text(3))
    with pytest.raises(InputError, match="negative_text has 2 entries for 4 prompts"):  # though 2 divides 4
        task(c, text=text(4), negative_text=text(2))
    for count in (1, 3):
        with pytest.raises(InputError, match=f"{count} generators for 2 videos; give one, or one per video"):
            task(c, text=text(2), generator=[seeded()] * count)
    with pytest.raises(InputError, match="cannot repeat a prompt 0 times"):
        task(c, num_videos_per_prompt=0)


def test_draws_do_not_depend_on_the_batch() -> None:
    assert torch.equal(draw_noise((3, 2, 4), seeded(1))[:1], draw_noise((1, 2, 4), seeded(1)))
    ours = draw_noise((2, 2, 4), [seeded(1), seeded(2)])
    assert torch.equal(ours[1], draw_noise((1, 2, 4), seeded(2))[0])


@pytest.mark.parametrize("task", TASKS)
def test_seeds(c: Components, task: Any) -> None:
    assert torch.equal(task(c, generator=seeded(1)), task(c, generator=seeded(1)))
    assert not close(task(c, generator=seeded(1)), task(c, generator=seeded(2)), 0.01)


@pytest.mark.parametrize("task", [i2v, vc])
def test_the_noise_is_drawn_before_the_posterior(c: Components, task: Any) -> None:
    """The official order: the same seed gives the same noise whether the posterior is sampled or not."""
    noise = draw_noise((1, 16, 3, 4, 6), seeded(1))
    assert torch.equal(task(c, generator=seeded(1)), task(c, noise=noise))
    first, again = (task(c, posterior="sample", generator=seeded(1)) for _ in range(2))
    assert torch.equal(first, again)
    generator = seeded(1)
    draw_noise((1, 16, 3, 4, 6), generator)
    assert torch.equal(first, task(c, posterior="sample", noise=noise, generator=generator))
    assert not close(first, task(c, generator=seeded(1)), 1e-3)


def test_prompts_are_strings_for_a_text_encoder() -> None:
    encoder = FakeTextEncoder()
    c = components(text_encoder=encoder)
    noise = randn(2, 16, 3, 4, 6)
    got = t2v(c, text=["a cat", "a dog"], negative_text="ugly", noise=noise)
    assert encoder.prompts == ["a cat", "a dog", "ugly"]
    states = encoder.encode(["a cat", "a dog"])
    assert torch.equal(got, t2v(c, text=states, negative_text=encoder.encode("ugly"), noise=noise))
    encoder.prompts.clear()
    assert t2v(c, text="a cat", negative_text=None).shape[0] == 1
    assert encoder.prompts == ["a cat", ""]  # the default negative prompt is the empty one
    encoder.prompts.clear()
    t2v(c, text="a cat", negative_text=None, guidance_scale=1.0)
    assert encoder.prompts == ["a cat"]  # no guidance, no negative


@pytest.mark.parametrize("task", TASKS)
def test_missing_parts(task: Any) -> None:
    bare = components()
    with pytest.raises(InputError, match="text is a prompt but there is no text encoder"):
        task(bare, text="a cat")
    with pytest.raises(InputError, match="negative_text is a prompt but there is no text encoder"):
        task(bare, negative_text="ugly")
    with pytest.raises(InputError, match="guidance_scale 4 needs a negative_text"):
        task(bare, negative_text=None)
    with pytest.raises(InputError, match="text is missing"):
        task(bare, text=None)
    with pytest.raises(InputError, match="text states have 8 channels, the DiT takes 32"):
        task(bare, text=TextStates(torch.zeros(1, 4, 8)))

    def no_step(_info: StepInfo) -> None:
        raise AssertionError("the missing VAE must be noticed before the first step")

    with pytest.raises(InputError, match="needs a VAE"):
        task(components(vae=None), output="frames", on_step=no_step)


def test_latents_from_text_need_no_vae() -> None:
    assert t2v(components(vae=None)).shape == (1, 16, 3, 4, 6)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"height": 40}, "height must be a multiple of 16, got 40; try 32 or 48"),
        ({"width": 50}, "width must be a multiple of 16, got 50; try 48 or 64"),
        ({"num_frames": 10}, r"num_frames must be 4k\+1, got 10; try 9 or 13"),
        ({"noise": torch.zeros(1, 16, 4, 4, 6)}, r"noise must be \[1, 16, 3, 4, 6\], got \[1, 16, 4, 4, 6\]"),
        ({"noise": torch.zeros(2, 16, 3, 4, 6)}, "noise must be"),
        ({"schedule": "fast"}, 'schedule must be "base" or "distilled"'),
        ({"output": "video"}, 'output must be "frames" or "latents"'),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"schedule": "distilled", "num_steps": 51}, "at most 50 steps"),
        ({"cfg_scope": "some"}, "cfg_scope must be"),
        ({"cfg_mode": "both"}, "cfg_mode must be"),
    ],
)
def test_wrong_options(c: Components, task: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        task(c, **options)


@pytest.mark.parametrize("task", TASKS)
def test_defaults_go_with_the_schedule(c: Components, task: Any) -> None:
    """50 steps with guidance 4, or 16 without."""
    for options, expected in ({}, (50, 4.0)), ({"schedule": "distilled"}, (16, 1.0)):
        seen: list[StepInfo] = []
        noise = randn(1, 16, 3, 4, 6)
        got = task(c, num_steps=None, on_step=seen.append, noise=noise, **options)
        assert len(seen) == expected[0]
        assert torch.equal(got, task(c, num_steps=expected[0], guidance_scale=expected[1], noise=noise, **options))


def sigmas_of(c: Components, task: Any, **options: Any) -> list[float]:
    seen: list[StepInfo] = []
    task(c, on_step=seen.append, **options)
    return [info.sigma for info in seen]


def test_schedules(c: Components) -> None:
    assert sigmas_of(c, t2v, num_steps=3) == schedule.base(3)[:-1].tolist()
    assert sigmas_of(c, vc, num_steps=3, uniform_tail=True) == schedule.with_tail(schedule.base(3))[:-1].tolist()
    assert sigmas_of(c, vc, num_steps=3) == schedule.base(3)[:-1].tolist()
    for tail in (True, False):  # the distilled schedule has no tail
        got = sigmas_of(c, vc, num_steps=3, schedule="distilled", uniform_tail=tail)
        assert got == schedule.distilled(3)[:-1].tolist()
    shifted = components(flow_shift=3.0)
    assert sigmas_of(shifted, t2v, num_steps=3) == schedule.base(3, flow_shift=3.0)[:-1].tolist()


def test_the_image_is_the_first_latent(c: Components) -> None:
    image = pictures(1)
    clean = encode_frames(c, prepare_frames(image, 32, 48, "stretch"))
    seen: list[StepInfo] = []
    got = i2v(c, image=image[0], on_step=seen.append)
    assert torch.equal(got[:, :, :1], clean)
    assert all(torch.equal(info.latents[:, :, :1], clean) for info in seen)


def test_several_images(c: Components) -> None:
    """One for each prompt, in order; one for all; one for each video."""
    images, generators = pictures(2), [seeded(i) for i in range(4)]
    batch = i2v(c, text=text(2), image=images, num_videos_per_prompt=2, generator=generators)
    for i in range(4):
        alone = i2v(c, text=text(2).select(i // 2), image=images[i // 2], generator=seeded(i))
        assert close(batch[i : i + 1], alone)
    shared = i2v(c, text=text(2), image=images[0], generator=generators[:2])
    assert torch.equal(shared[:1, :, :1], shared[1:, :, :1])
    four = i2v(c, image=pictures(4), num_videos_per_prompt=4)
    assert len(four[:, :, 0].flatten(1).unique(dim=0)) == 4
    with pytest.raises(InputError, match="3 images for 2 prompts; give one, or one per prompt"):
        i2v(c, text=text(2), image=pictures(3))
    with pytest.raises(InputError, match="2 images for 4 prompts"):
        i2v(c, text=text(4), image=images)


def test_sampled_posteriors_of_a_batch_are_those_of_the_single_runs(c: Components) -> None:
    images = pictures(2)
    batch = i2v(c, text=text(2), image=images, posterior="sample", generator=[seeded(1), seeded(2)])
    for i in range(2):
        alone = i2v(c, text=text(2).select(i), image=images[i], posterior="sample", generator=seeded(i + 1))
        assert close(batch[i : i + 1], alone)
    # An image is encoded once for all its videos, with the random numbers of the first of them.
    options = {"posterior": "sample", "num_videos_per_prompt": 2, "generator": [seeded(i) for i in range(4)]}
    batch = i2v(c, text=text(2), image=images, **options)
    assert torch.equal(batch[2, :, 0], batch[3, :, 0])
    for i in range(2):
        alone = i2v(c, text=text(2).select(i), image=images[i], posterior="sample", generator=seeded(2 * i))
        assert close(batch[2 * i : 2 * i + 1], alone)


def image_kinds() -> dict[str, Any]:
    image = pictures(1)[0]
    array = image.numpy()
    return {
        "PIL": Image.fromarray(array), "PIL list": [Image.fromarray(array)], "numpy": array,
        "numpy float": array.astype(np.float64) / 255, "torch": image, "torch float": image.float() / 255,
        "batched": image[None], "RGBA": Image.fromarray(array).convert("RGBA"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", image_kinds())
def test_images_of_every_kind(c: Components, kind: str) -> None:
    noise = randn(1, 16, 3, 4, 6)
    assert close(i2v(c, image=image_kinds()[kind], noise=noise), i2v(c, image=pictures(1)[0], noise=noise))


@pytest.mark.parametrize("kind", ["uint8", "float", "numpy", "PIL"])
def test_clips_of_every_kind(c: Components, kind: str) -> None:
    clip, noise = pictures(6), randn(1, 16, 3, 4, 6)
    given = {"uint8": clip, "float": clip.float() / 255, "numpy": clip.numpy(),
             "PIL": [Image.fromarray(f) for f in clip.numpy()]}[kind]  # fmt: skip
    assert close(vc(c, frames=given, noise=noise), vc(c, frames=clip, noise=noise))


def test_grey_pictures(c: Components) -> None:
    grey = pictures(1)[0, :, :, :1]
    noise = randn(1, 16, 3, 4, 6)
    assert close(i2v(c, image=grey[..., 0], noise=noise), i2v(c, image=grey.expand(-1, -1, 3), noise=noise))


def test_size_follows_the_picture(c: Components) -> None:
    assert i2v(c, image=pictures(1, 480, 320)[0]).shape[3:] == (6, 4)
    assert vc(c, frames=pictures(5, 60, 60)).shape[3:] in {(4, 4), (4, 6), (6, 4)}
    assert i2v(c, image=pictures(1, 480, 320)[0], height=32, width=64).shape[3:] == (4, 8)
    official = components(native=Native(num_frames=5, num_cond_frames=1))
    square = i2v(official, image=pictures(1, 64, 64)[0], num_steps=1, guidance_scale=1.0, num_frames=5)
    assert square.shape[3:] == (608 // 8, 640 // 8)


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_fit(c: Components, fit: str) -> None:
    image = pictures(1, 40, 100)
    expected = encode_frames(c, prepare_frames(image, 32, 48, fit))  # type: ignore[arg-type]
    assert torch.equal(i2v(c, image=image, height=32, width=48, fit=fit)[:, :, :1], expected)
    with pytest.raises(InputError, match="fit must be"):
        i2v(c, fit="cover")


def test_an_image_needs_more_frames_than_itself(c: Components) -> None:
    with pytest.raises(InputError, match="at least 5, got 1"):
        i2v(c, num_frames=1)


def test_the_guidance_scale_over_all_frames_is_another(c: Components) -> None:
    noise = randn(1, 16, 3, 4, 6)
    a, b = (i2v(c, noise=noise, cfg_scope=scope, num_steps=4) for scope in ("noise", "all"))
    assert not close(a, b, 1e-3)
    a, b = (vc(c, noise=noise, cfg_scope=scope, use_kv_cache=False, num_steps=4) for scope in ("noise", "all"))
    assert not close(a, b, 1e-3)
    # Without condition frames, or without guidance, there is no difference.
    assert torch.equal(t2v(c, noise=noise, cfg_scope="all"), t2v(c, noise=noise))
    one = {"noise": noise, "guidance_scale": 1.0}
    assert close(i2v(c, cfg_scope="all", **one), i2v(c, **one))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_cache_is_exact(c: Components, scale: float) -> None:
    """Without guidance as officially; with it because the scale is taken over the noise frames either way."""
    noise = randn(1, 16, 3, 4, 6)
    cached, whole = (vc(c, noise=noise, use_kv_cache=use, guidance_scale=scale) for use in (True, False))
    assert close(cached, whole, 1e-4)


def test_only_the_last_frames_of_a_clip_count(c: Components) -> None:
    clip, noise = pictures(20), randn(1, 16, 3, 4, 6)
    got = vc(c, frames=clip, noise=noise)
    assert torch.equal(got, vc(c, frames=clip[-5:], noise=noise))
    expected = encode_frames(c, prepare_frames(clip[-5:], 32, 48, "stretch"))
    assert torch.equal(got[:, :, :2], expected)
    assert got.shape[2] == 3
    longer = vc(c, frames=clip, num_cond_frames=9, num_frames=17)
    assert longer.shape[2] == 5
    assert torch.equal(longer[:, :, :3], encode_frames(c, prepare_frames(clip[-9:], 32, 48, "stretch")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frames": pictures(3)}, "the clip has 3 frames but num_cond_frames is 5; use num_cond_frames=1"),
        ({"num_cond_frames": 0}, "num_cond_frames must be at least 1, got 0; the released model uses 13"),
        ({"num_cond_frames": 6}, r"num_cond_frames must be 4k\+1, got 6; try 5 or 9"),
        ({"num_cond_frames": 5, "num_frames": 5}, "nothing would be new"),
        ({"num_cond_frames": 9, "num_frames": 5}, "nothing would be new"),
        ({"frames": []}, "at least one picture"),
        ({"frames": torch.zeros(5, 3, 32, 48)}, "channels last"),
        ({"frames": 255 * torch.ones(5, 32, 48, 3)}, "divide by 255"),
        ({"posterior": "mean"}, "posterior must be"),
    ],
)
def test_wrong_clips(c: Components, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        vc(c, **options)


def test_tiling_is_used(c: Components) -> None:
    noise = randn(1, 16, 3, 4, 6)
    tiled = components(tiling=Tiling(16, 8))
    assert not torch.equal(i2v(tiled, noise=noise)[:, :, 0], i2v(c, noise=noise)[:, :, 0])
    latents = t2v(c, noise=noise)
    assert torch.equal(t2v(tiled, noise=noise), latents)
    assert not torch.equal(t2v(tiled, noise=noise, output="frames"), t2v(c, noise=noise, output="frames"))


def adapter() -> dict[str, Tensor]:
    """A LoRA on two layers, one of them inside an fp32 island."""
    prefix, dash = "lora", "___lorahyphen___"
    state = {}
    for k, (name, rows, columns) in enumerate((("final_layer.linear", 64, 64), ("blocks.0.ffn.w1", 256, 64))):
        key = prefix + "".join(dash + part for part in name.split("."))
        state[f"{key}.lora_down.weight"] = randn(4, columns, seed=k)
        state[f"{key}.lora_up.weight"] = randn(rows, 4, seed=10 + k)
        state[f"{key}.alpha_scale"] = torch.tensor(0.5)
    return state


def state_of(c: Components) -> tuple[dict[str, Tensor], int]:
    hooks = sum(len(m._forward_hooks) for m in c.dit.modules())
    return {name: tensor.clone() for name, tensor in c.dit.state_dict().items()}, hooks


@pytest.mark.parametrize("task", TASKS)
def test_the_distill_adapter_is_on_in_distilled_runs_alone(task: Any) -> None:
    dit, noise = make_dit(), randn(1, 16, 3, 4, 6)
    plain, adapted = components(dit=dit), components(dit=dit, adapters={"distill": adapter()})
    before, hooks = state_of(plain)
    base = task(plain, noise=noise)
    distilled = task(plain, noise=noise, schedule="distilled")
    assert torch.equal(task(adapted, noise=noise), base)
    changed = task(adapted, noise=noise, schedule="distilled")
    assert not close(changed, distilled, 1e-2)
    assert torch.equal(task(plain, noise=noise, schedule="distilled"), distilled)

    def fail(_info: StepInfo) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        task(adapted, noise=noise, schedule="distilled", on_step=fail)
    assert torch.equal(task(plain, noise=noise), base)
    assert torch.equal(task(adapted, noise=noise, schedule="distilled"), changed)
    after, hooks_after = state_of(plain)
    assert hooks_after == hooks and all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_of_another_name_is_not_used() -> None:
    noise = randn(1, 16, 3, 4, 6)
    c = components(adapters={"refinement": adapter()})
    assert torch.equal(t2v(c, noise=noise, schedule="distilled"), t2v(components(), noise=noise, schedule="distilled"))


def test_a_model_in_bf16_gives_fp32(c: Components) -> None:
    half = components(dit=make_dit(torch.bfloat16))
    noise = randn(1, 16, 3, 4, 6)
    for task in TASKS:
        got, expected = task(half, noise=noise), task(c, noise=noise)
        assert got.dtype == torch.float32
        assert (got - expected).norm() / expected.norm() <= 0.1
