"""Every family against its stock pipeline: the same tensors, the same velocity, the same image; a batch and alone.

A family comes into these tests by its row in `family_cases.CASES`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st
from PIL import Image
from skimage import data
from torch import nn

from mixres.batch import Batch, Sample
from mixres.data.collate import collate
from mixres.errors import UserError
from mixres.geometry import Size, token_count
from mixres.models.family import Family
from mixres.models.lora import attach, trainable_parameters
from mixres.models.lora_file import FILE_NAME, lora_file, read_header
from mixres.models.qwen import rope
from mixres.models.qwen.family import QwenFamily
from mixres.training import denoising
from mixres.training.denoising import image_inputs, make_images
from support import mixes
from support.family_cases import EVERY_CASE as CASES, PROMPTS, FamilyCase
from support.lora_files import KINDS
from support.steps import with_adapters

ADAPTERS = [(name, "lora") for name in CASES]
OTHER_ADAPTERS = [(name, "dora") for name in ("zero_cond_t", "flux2_klein", "flux_kontext")]
OTHER_ADAPTERS += [("zero_cond_t", "lokr"), ("z_image", "loha")]
NAMES = [name for name, case in CASES.items() if not case.zero_cond_t]
TARGETS = (Size(96, 96), Size(64, 112), Size(144, 80))
CONTROLS = (Size(200, 75), Size(61, 190), Size(96, 96))
A_PIPELINE_EACH = pytest.mark.parametrize(  # for what does not depend on the transformer
    "case", [CASES[name] for name in NAMES], ids=NAMES, indirect=True, scope="module"
)
BATCHED = ("qwen_image_edit_plus", "flux2_klein", "flux_kontext", "qwen_image_21", "z_image")  # one of each kind
LIKE_OTHERS = ("qwen_image_edit_plus", "zero_cond_t", "flux2_dev", "flux")  # they sample as another case does
IN_FLOAT32 = pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"], indirect=True, scope="module")


def photograph(size: Size, turned: int = 0) -> Image.Image:
    return Image.fromarray(data.astronaut()).rotate(90 * turned).resize(size, Image.Resampling.LANCZOS)


def images(count: int, first: int = 0) -> list[Image.Image]:
    """So many controls, each of another size; `first` says which size comes first."""
    return [photograph(CONTROLS[(first + k) % 3], k) for k in range(count)]


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> FamilyCase:
    return request.param


@pytest.fixture(scope="module")
def base(case: FamilyCase, base_of: Callable[[FamilyCase], Path]) -> Path:
    return base_of(case)


HALF = pytest.param(torch.bfloat16, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[torch.float32, HALF], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def encoders(case: FamilyCase, base: Path, dtype: torch.dtype) -> Any:
    return case.at(base).load_encoders(dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def stock(case: FamilyCase, base: Path, dtype: torch.dtype) -> Any:
    return case.load_stock(base, dtype)


def encode(
    case: FamilyCase, encoders: Any, controls: list[Image.Image], prompt: str, size: Size = TARGETS[1], **call: Any
) -> Sample:
    size = case.fitted(size)
    call = {"sizes": case.sizes(size, controls)} | call
    target = photograph(Size(170, 90), 2)
    return case.at(encoders.name_or_path).encode(
        encoders, name="a", target=target, target_size=size, controls=controls, prompt=prompt, **call
    )


class _CapturedError(Exception):
    """Ends the stock pipeline once its transformer has been called."""


def transformer_arguments(
    pipeline: Any, case: FamilyCase, areas: dict[str, int], controls: list[Image.Image], size: Size, **call: Any
) -> dict[str, Any]:
    """What the stock pipeline hands to its transformer at step 0."""
    captured: dict[str, Any] = {}

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.update(case.seen(args, kwargs))
        raise _CapturedError

    handle = pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    with pytest.raises(_CapturedError):
        stock_image(pipeline, case, areas, controls, size, **call)
    handle.remove()
    return captured


def stock_image(
    pipeline: Any,
    case: FamilyCase,
    areas: dict[str, int],
    controls: list[Image.Image],
    size: Size,
    *,
    aligned: Size | None = None,
    **call: Any,
) -> Image.Image:
    """In three steps, of seed 7, without guidance unless `call` has it."""
    call = case.unguided() | {"generator": torch.Generator().manual_seed(7)} | call
    given = case.stock_controls(controls, case.sizes(size, controls, areas, aligned=aligned is not None))
    with case.stock_areas(areas, aligned):
        made = pipeline(**case.call(given, size), width=size.width, height=size.height, num_inference_steps=3, **call)
    image: Image.Image = made.images[0]
    return image


@A_PIPELINE_EACH
def test_a_sample_is_what_the_stock_transformer_is_handed(case: FamilyCase, encoders: Any, stock: Any) -> None:
    assert encoders.transformer is None
    assert not any(p.requires_grad for part in (encoders.vae, encoders.text_encoder) for p in part.parameters())
    larger = {name: 2 * area for name, area in case.areas.items()}
    prompts = [*PROMPTS, "a word {that} was never seen: zebra", "", PROMPTS[0]]
    for number, prompt in enumerate(prompts):
        count, first = case.controls[number % len(case.controls)], number // 3
        areas, size = ((case.areas, case.fitted(TARGETS[1])), (larger, case.fitted(TARGETS[2])))[first]
        controls = images(count, first)
        same = number % 2 == 1  # the stock pipeline's resize function returns the target's size
        sizes = case.sizes(size, controls, areas, aligned=same)
        sample = encode(case, encoders, controls, prompt, size, sizes=sizes)
        assert not same or len(set(sample.img_shapes)) == 1
        aligned = size if same else None
        seen = transformer_arguments(stock, case, areas, controls, size, prompt=prompt, aligned=aligned)
        case.check_text(seen, sample)
        assert len(sample.control_latents) == count
        expected = case.controls_of(seen, sample)
        assert torch.equal(torch.cat([*sample.control_latents, expected[:0]]), expected)
        for tensor in (sample.target_latents, sample.prompt_embeds, *sample.control_latents):
            assert tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.requires_grad
        assert all(type(side) is int for grid in sample.img_shapes for side in grid)


@A_PIPELINE_EACH
def test_target_latents_are_those_of_the_stock_pipelines(case: FamilyCase, encoders: Any, stock: Any) -> None:
    for size in map(case.fitted, TARGETS):
        sample = encode(case, encoders, images(case.controls[0]), PROMPTS[0], size)
        with torch.no_grad():
            assert torch.equal(sample.target_latents, case.latents(stock, photograph(Size(170, 90), 2), size))
        assert sample.target_latents.dtype == stock.vae.dtype


@A_PIPELINE_EACH
@IN_FLOAT32
def test_a_mask_becomes_the_fraction_of_each_target_token(case: FamilyCase, encoders: Any) -> None:
    assert encode(case, encoders, images(case.controls[0]), "").edit_mask is None
    mask = photograph(Size(170, 90)).convert("L")
    sample = encode(case, encoders, images(case.controls[0]), "", mask=mask)
    _, rows, columns = sample.img_shapes[0]
    # Each pixel cut into rows x columns equal parts makes every token a whole number of parts.
    parts = np.kron(np.asarray(mask) / 255, np.ones((rows, columns))).reshape(rows, mask.height, columns, mask.width)
    assert sample.edit_mask is not None and sample.edit_mask.dtype == torch.float32
    np.testing.assert_allclose(sample.edit_mask.numpy(), parts.mean((1, 3)).flatten(), atol=1e-5)


@A_PIPELINE_EACH
@IN_FLOAT32
def test_what_a_family_does_not_take_is_refused_by_name(case: FamilyCase, encoders: Any) -> None:
    low, high = case.at("").controls
    for count in {low - 1, -1 if high is None else high + 1} - {-1}:
        with pytest.raises(UserError, match=f"^a: .* control image.*, there are {count}[;:] "):
            encode(case, encoders, images(count), "x")
    if case.family.startswith("qwen"):
        with pytest.raises(UserError, match=r"^a: the prompt contains <\|image_pad\|>, a marker"):
            encode(case, encoders, images(low), "put <|image_pad|> here")


def test_a_predicted_velocity_is_that_of_the_stock_call(
    case: FamilyCase, base: Path, encoders: Any, stock: Any
) -> None:
    """At step 0 the stock pipeline's sigma is 1; the transformer here is the patched one."""
    controls, size = images(max(case.controls)), case.fitted(Size(64, 48))
    sample = encode(case, encoders, controls, PROMPTS[0], size)
    seen = transformer_arguments(stock, case, case.areas, controls, size, prompt=PROMPTS[0])
    transformer = case.at(base).load_transformer(dtype=stock.vae.dtype, device="cpu")
    assert transformer.config.get("zero_cond_t", False) is case.zero_cond_t
    tokens = sample.img_shapes[0].tokens
    noise = case.target_of(seen["hidden_states"], tokens)
    batch = batch_of([sample], case.exact)
    latents = torch.cat([noise, *sample.control_latents]).float().reshape(batch.latents.shape)
    with torch.no_grad():
        expected = case.target_of(case.stock_velocity(stock.transformer, seen), tokens)
        velocity = case.at("").predict_velocity(transformer, batch, latents, torch.ones(1), seen.get("guidance"))
    assert velocity.dtype == stock.vae.dtype
    assert (velocity.flatten(0, 1)[:tokens] - expected).norm() <= 1e-6 * expected.norm()


def largest_difference(image: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max())


def sampled(family: Family, pipeline: Any, calls: list[dict[str, Any]]) -> list[Image.Image]:
    """All in one batch."""
    inputs = [image_inputs(family, pipeline, **call) for call in calls]
    return make_images(family, pipeline, inputs, steps=3)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name, case in CASES.items()],
    indirect=True,
    scope="module",
)
@IN_FLOAT32
def test_an_image_from_cached_embeddings_is_the_stock_image(
    case: FamilyCase, base: Path, encoders: Any, stock: Any
) -> None:
    """With guidance too."""
    sampling = sampling_of(case, base)
    assert sampling.text_encoder is None and getattr(sampling, "tokenizer", None) is None
    size = case.fitted(Size(64, 80))
    count = max(case.controls)  # others are in the batches below
    for aligned in (size, None):
        sizes = case.sizes(size, images(count), aligned=aligned is not None)
        text = encode(case, encoders, images(count), PROMPTS[0], sizes=sizes).text
        call: dict[str, Any] = {"controls": images(count), "text": text, "sizes": sizes, "size": size, "seed": 7}
        expected = stock_image(stock, case, case.areas, images(count), size, prompt=PROMPTS[0], aligned=aligned)
        (made,) = sampled(case.at(base), sampling, [call])
        assert made.size == tuple(size)
        assert largest_difference(made, expected) <= 1
    # The bound means something: another prompt, seed, guidance, control or area is an image farther away.
    negative = encode(case, encoders, images(count), PROMPTS[1]).text
    changes: list[dict[str, Any]] = [case.guidance(negative)]
    changes += [{"text": text._replace(tokens=-text.tokens)}, {"seed": 8}]
    if count:
        changes += [
            {"controls": [*images(count)[:-1], photograph(CONTROLS[0], 3)]},
            {"sizes": case.sizes(size, images(count), case.areas | {"control_area": 64 * 64})},
        ]
    others = sampled(case.at(base), sampling, [call | change for change in changes])
    assert all(largest_difference(other, expected) > 2 for other in others)
    words = case.guided(PROMPTS[0], PROMPTS[1], negative)
    assert largest_difference(others[0], stock_image(stock, case, case.areas, images(count), size, **words)) <= 1


@dataclass(frozen=True)
class Wanted:
    """One image of a batch."""

    size: Size
    count: int  # of control images
    prompt: str
    seed: int
    guided: bool

    def call(self, case: FamilyCase, encoders: Any) -> dict[str, Any]:
        """The arguments of `image_inputs`."""
        controls, size = images(self.count, self.seed), case.fitted(self.size)
        sizes = case.sizes(size, controls)
        text, negative = (encode(case, encoders, controls, x, sizes=sizes).text for x in (self.prompt, PROMPTS[1]))
        guidance = case.guidance(negative) if self.guided else {}
        return {"controls": controls, "text": text, "size": size, "sizes": sizes, "seed": self.seed, **guidance}

    def stock(self, stock: Any, case: FamilyCase, encoders: Any) -> Image.Image:
        controls, noise = images(self.count, self.seed), torch.Generator().manual_seed(self.seed)
        words = case.unguided() | {"prompt": self.prompt}
        if self.guided:
            words = case.guided(self.prompt, PROMPTS[1], encode(case, encoders, controls, PROMPTS[1]).text)
        return stock_image(stock, case, case.areas, controls, case.fitted(self.size), generator=noise, **words)


def sampling_of(case: FamilyCase, base: Path) -> Any:
    transformer = case.at(base).load_transformer(dtype=torch.float32, device="cpu")
    return case.at(base).load_sampling_pipeline(transformer=transformer, dtype=torch.float32, device="cpu")


def assert_images_of_a_batch(
    wanted: list[Wanted], case: FamilyCase, base: Path, sampling: Any, encoders: Any, stock: Any
) -> None:
    calls = [each.call(case, encoders) for each in wanted]
    for each, call, made in zip(wanted, calls, sampled(case.at(base), sampling, calls), strict=True):
        (alone,) = sampled(case.at(base), sampling, [call])
        assert largest_difference(made, alone) <= 1
        assert largest_difference(made, each.stock(stock, case, encoders)) <= 1


@pytest.mark.parametrize("case", [CASES[name] for name in BATCHED], ids=BATCHED, indirect=True, scope="module")
@IN_FLOAT32
def test_images_made_together_are_those_of_the_stock_pipeline_alone(
    case: FamilyCase, base: Path, encoders: Any, stock: Any
) -> None:
    wanted = [
        Wanted(size, count, prompt, seed, guided=seed != 1)
        for seed, (size, count, prompt) in enumerate(zip(TARGETS, case.controls, PROMPTS, strict=True))
    ]
    assert_images_of_a_batch(wanted, case, base, sampling_of(case, base), encoders, stock)


@pytest.mark.slow
@IN_FLOAT32
def test_images_of_any_mix_are_those_of_the_stock_pipeline_alone(
    case: FamilyCase, base: Path, encoders: Any, stock: Any
) -> None:
    sampling, sides = sampling_of(case, base), st.integers(3, 10).map(lambda n: 16 * n)
    size = st.builds(Size, sides, sides)
    one = st.builds(
        Wanted, size, st.sampled_from(case.controls), st.sampled_from(PROMPTS), st.integers(0, 9), st.booleans()
    )

    @settings(max_examples=3, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
    @given(st.lists(one, min_size=1, max_size=6))
    def check(wanted: list[Wanted]) -> None:
        assert_images_of_a_batch(wanted, case, base, sampling, encoders, stock)

    check()


@pytest.mark.parametrize("case", [CASES["qwen_image_edit"]], ids=["qwen_image_edit"], indirect=True, scope="module")
@IN_FLOAT32
def test_what_images_of_a_batch_may_not_share_is_seen(
    case: FamilyCase, base: Path, encoders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in place of its own has what the first image has, over a base whose shift grows with small sizes."""
    base = Path(shutil.copytree(base, tmp_path / "base"))
    config = base / "scheduler" / "scheduler_config.json"
    steep = {"base_image_seq_len": 16, "max_image_seq_len": 256, "base_shift": 0.0, "max_shift": 6.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | steep))
    stock = case.load_stock(base, torch.float32)
    wanted = [
        Wanted(size, 1, PROMPTS[0], seed, guided=True) for seed, size in enumerate((Size(48, 64), Size(160, 144)))
    ]
    sampling = sampling_of(case, base)
    assert_images_of_a_batch(wanted, case, base, sampling, encoders, stock)
    shared: dict[str, Any] = {
        "schedule": (
            denoising,
            "_scheduler",
            lambda family, pipeline, tokens, steps: scheduler(family, pipeline, 12, steps),
        ),
        "generator": (QwenFamily, "noise", lambda self, grid, seed, dtype: noise(self, grid, seed=0, dtype=dtype)),
        "text positions": (rope, "text_start", lambda shapes: 4),
        "guidance": (QwenFamily, "guide", lambda self, positive, negative, guidance: positive),
    }
    scheduler, noise = denoising._scheduler, QwenFamily.noise
    for problem in shared.values():
        with monkeypatch.context() as patch:
            patch.setattr(*problem)
            with pytest.raises(AssertionError):
                assert_images_of_a_batch(wanted, case, base, sampling, encoders, stock)


def batch_of(samples: list[Sample], layout: Any) -> Batch:
    return collate(samples, indices=range(len(samples)), weights=[1.0] * len(samples), layout=layout)


def predicted(case: FamilyCase, transformer: nn.Module, batch: Batch, sigmas: torch.Tensor) -> torch.Tensor:
    """Each sample with a guidance of its own where the transformer takes one."""
    guidance = 1 + sigmas if transformer.config.get("guidance_embeds") else None
    return case.at("").predict_velocity(transformer, batch, batch.latents, sigmas, guidance)


def trained_on(case: FamilyCase, transformer: nn.Module, batches: list[Batch], sigmas: torch.Tensor) -> mixes.Result:
    """Each sample's velocities at its image tokens, and the adapters' gradients of a loss over its target tokens."""
    outputs, losses = [], []
    for batch, chosen in zip(batches, sigmas.split([len(batch.names) for batch in batches]), strict=True):
        velocity = predicted(case, transformer, batch, chosen)
        lengths = [token_count(grids) for grids in batch.img_shapes]
        rows = velocity[:, 0].split(lengths) if batch.layout == "packed" else list(velocity)
        outputs += [row[:length] for row, length in zip(rows, lengths, strict=True)]
        valid = velocity.flatten(0, 1)[batch.target_index].split(batch.target_lengths)
        losses += [tokens.square().mean() for tokens in valid]
    result = mixes.backward(transformer, outputs, torch.stack(losses).sum())
    return mixes.Result(result.outputs, {name: result.gradients[name] for name in trainable_parameters(transformer)})


@IN_FLOAT32
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(
            CASES[name],
            kind,
            id=f"{name}, {kind}",
            marks=[pytest.mark.slow] * (kind != "lora" or name in ("flux2_dev", "flux")),
        )
        for name, kind in (*ADAPTERS, *OTHER_ADAPTERS)
    ],
    indirect=["case"],
    scope="module",
)
def test_a_batch_of_all_control_counts_is_its_samples_alone(
    case: FamilyCase, base: Path, encoders: Any, kind: str, tmp_path: Path
) -> None:
    """And the stock pipeline with the adapters' file gives the same."""
    samples = [
        encode(case, encoders, images(count), prompt, size)
        for count, prompt, size in zip(case.controls, PROMPTS, TARGETS, strict=True)
    ]
    assert [len(s.control_latents) for s in samples] == list(case.controls)
    transformer = case.at(base).load_transformer(dtype=torch.float32, device="cpu")
    layers = {"target_modules": ["attention"], "presets": case.at("").lora_presets}
    with_adapters(transformer, **KINDS[kind], untrained=case.at("").untrained_modules(transformer), **layers)
    sigmas = torch.tensor([0.9, 0.2, 0.5])
    alone = trained_on(case, transformer, [batch_of([sample], "padded") for sample in samples], sigmas)
    assert all(gradient is not None and gradient.any() for gradient in alone.gradients.values())
    for layout in mixes.LAYOUTS:
        mixes.assert_same(trained_on(case, transformer, [batch_of(samples, layout)], sigmas), alone)

    (tmp_path / FILE_NAME).write_bytes(lora_file(trainable_parameters(transformer), transformer, {}))
    stock = case.load_stock(base, torch.float32)
    for loaded in (False, True):
        if loaded:
            attach(stock, read_header(str(tmp_path)))
        for sample, sigma, expected in zip(samples, sigmas, alone.outputs, strict=True):
            batch = batch_of([sample], "padded")
            with torch.no_grad():
                (found,) = predicted(case, case.taking_batches(stock.transformer), batch, sigma[None])
            error = float((found - expected).norm() / expected.norm())
            assert error <= 1e-6 if loaded else error > 1e-3
