"""Follows one sample through a training step, for docs/one_step.md: `python scripts/one_step.py` writes its blocks.

Promise: every line of the page's blocks is printed by the functions that train, on the tiny base and three pairs of
photographs. `tests/test_one_step_page.py` holds the page against them. Needs `pip install 'mixres[demo]'`. Cost: ten
seconds, a base and a cache in a temporary folder.
"""

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import skimage.data
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from mixres.batch import Batch
from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.data.collate import collate
from mixres.data.scan import ScannedRecord
from mixres.diffusion.flow_matching import make_flow_sample, resolution_shift
from mixres.diffusion.objective import velocity_loss
from mixres.preprocessing.fill import encode_all, family_of
from mixres.preprocessing.training_data import usable_records
from mixres.quickstart.data import PROMPTS
from mixres.training.optimizer import Schedule
from mixres.training.setup import build_objective, build_plan, load_trained
from mixres.training.step import run_step

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.tiny_pipeline import write_tiny_pipeline

PAGE = Path(__file__).parents[1] / "docs" / "one_step.md"
BLOCK = re.compile(r"```text\n(.*?)```", re.DOTALL)
PROMPT = "make it blue"
FOLLOWED = "training_images/cat.png"
# Each picture, the size of its target file and of its control file. `cat` is the one that is followed.
PAIRS = {
    "cat": (skimage.data.chelsea, (200, 133), (160, 107)),
    "cup": (skimage.data.coffee, (240, 160), (150, 100)),
    "rocket": (skimage.data.rocket, (96, 96), (96, 96)),
}


def write_data(root: Path) -> None:
    """Pairs of different sizes: the photograph, and the same with red and blue exchanged as its target."""
    for name, (photograph, target, control) in PAIRS.items():
        picture = Image.fromarray(photograph())
        files = {
            "training_images": Image.merge("RGB", picture.split()[::-1]).resize(target),
            "control_images": picture.resize(control),
        }
        for folder, image in files.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            image.save(root / folder / f"{name}.png")
        (root / "training_images" / f"{name}.txt").write_text(PROMPT, encoding="utf-8")


def configuration(root: Path, base: Path) -> Config:
    """A run of one step over the three pairs."""
    file = root / "run.yaml"
    file.write_text(
        f"""
model: {{pretrained_model_name_or_path: {base}, dtype: float32, lora: {{r: 4, lora_alpha: 4}}}}
data: {{train: {root / "pairs"}, resize: {{control: {{area: 16384}}}}}}
batch: {{samples_per_step: 3, max_tokens: 400}}
optimizer: {{init_args: {{weight_decay: 0.0}}}}
train: {{max_train_steps: 1, mixed_precision: "no", gradient_checkpointing: false}}
cache: {{cache_dir: {root / "cache"}}}
logging: {{output_dir: {root / "run"}}}
""",
        encoding="utf-8",
    )
    return load_config(file)


def stations(root: Path, base: Path) -> list[str]:
    """The text of every block of the page, in order."""
    torch.set_num_threads(1)
    write_data(root / "pairs")
    config = configuration(root, base)
    return ["\n".join(lines) + "\n" for lines in _stations(config)]


def _stations(config: Config) -> Iterator[list[str]]:
    family = family_of(config)
    scanned = next(s for s in usable_records(config, family, is_main=False)[0] if s.record.name == FOLLOWED)
    yield _record(scanned)
    encoded = encode_all(config, family, device=torch.device("cpu"), rank=0)
    number = next(n for n, item in enumerate(encoded.train) if item.record.name == FOLLOWED)
    item = encoded.train[number]
    sample = encoded.cache.read(item.key, name=item.record.name)
    yield [
        f"Sample.target_latents     {_shape(sample.target_latents)}",
        f"Sample.control_latents[0] {_shape(sample.control_latents[0])}",
        f"Sample.prompt_embeds      {_shape(sample.prompt_embeds)}",
        f"Sample.img_shapes         {[tuple(grid) for grid in sample.img_shapes]}",
        f"cache entry               {len(item.key)} characters of hash, "
        f"{encoded.cache.path(item.key).stat().st_size} bytes",
    ]
    plan = build_plan(config, encoded, world_size=1)
    planned = plan.step(0)
    names = [one.record.name.rpartition("/")[2] for one in encoded.train]
    yield [
        "tokens (text + images)    "
        + ", ".join(
            f"{name} {one.lengths.text} + {one.lengths.image}" for name, one in zip(names, encoded.train, strict=True)
        ),
        *(
            f"microbatch {m}              {', '.join(names[i] for i in microbatch.indices)}"
            for m, microbatch in enumerate(planned.ranks[0])
        ),
        f"divisor of the step       {planned.samples} samples ({planned.target_tokens} target tokens)",
    ]
    batches = [
        collate(
            [encoded.cache.read(encoded.train[i].key, name=names[i]) for i in microbatch.indices],
            indices=microbatch.indices,
            weights=microbatch.weights,
            layout=config.batch.layout,
        )
        for microbatch in planned.ranks[0]
    ]
    batch = next(batch for batch in batches if number in batch.indices)
    yield from _computed(config, batches, batch, number, planned.samples)


def _record(scanned: ScannedRecord) -> list[str]:
    record = scanned.record
    return [
        f"EditRecord.name           {record.name}",
        f"EditRecord.prompt         {record.prompt}",
        f"target, upright           {scanned.target_size}",
        f"control, upright          {scanned.control_sizes[0]}",
    ]


def _computed(config: Config, batches: list[Batch], batch: Batch, number: int, divisor: int) -> Iterator[list[str]]:
    """From the batch on: noise, velocity, loss and update."""
    family = family_of(config)
    place = batch.indices.index(number)
    first = sum(batch.target_lengths[:place])
    rows = batch.target_index[first : first + batch.target_lengths[place]]
    yield [
        f"Batch.layout              {batch.layout}",
        f"Batch.latents             {_shape(batch.latents)}",
        f"Batch.prompt_embeds       {_shape(batch.prompt_embeds)}",
        f"Batch.target_index        {_shape(batch.target_index)}, its own rows {int(rows[0])} to {int(rows[-1])}",
    ]
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    trained = load_trained(config, family, accelerator)
    objective = build_objective(config, family)
    flow = make_flow_sample(
        batch,
        seed=objective.seed,
        step=0,
        timesteps=objective.timesteps,
        constants=objective.shift_constants,
        dtype=objective.dtype,
    )
    sigma = flow.sigmas[place]
    clean, noisy = batch.latents.flatten(0, 1)[rows], flow.noisy_latents.flatten(0, 1)[rows]
    target = flow.velocity[first : first + len(rows)]
    blend = (1 - sigma) * clean + sigma * (clean + target)
    yield [
        f"shift of its sigma        {resolution_shift(len(rows), objective.shift_constants):.3f}",
        f"sigma                     {sigma:.3f}",
        f"velocity target           {_shape(target)}, noise - clean",
        f"noisy - blend, largest    {(noisy - blend).abs().max() < 1e-5 and 'below 0.00001'}",
        f"controls                  {'unchanged' if _others_equal(batch, flow.noisy_latents) else 'changed'}",
    ]
    with torch.no_grad():
        velocity = objective.predict_velocity(trained.transformer, batch, flow.noisy_latents, flow.sigmas)
    loss = velocity_loss(velocity, batch, flow, normalization="sample")
    own = (velocity.flatten(0, 1)[rows] - target).square().mean()
    yield [
        f"velocity                  {_shape(velocity)}, at every image token",
        f"its own squared error     {own:.3f}, the mean over {len(rows)} target tokens",
        f"numerator of the batch    {loss:.3f}, of {len(batch.names)} samples",
    ]
    Schedule(trained.optimizer, **config.lr_scheduler.model_dump(), max_train_steps=1).set(0)
    before = {name: parameter.detach().clone() for name, parameter in trained.parameters.items()}
    result = run_step(
        accelerator,
        trained.model,
        trained.optimizer,
        objective,
        batches,
        count=len(batches),
        step=0,
        divisor=divisor,
        max_grad_norm=config.train.max_grad_norm,
    )
    moved = {name for name, parameter in trained.parameters.items() if not torch.equal(parameter, before[name])}
    halves = {half: sum(f"lora_{half}" in name for name in moved) for half in "AB"}
    yield [
        f"loss of the step          {result.loss:.3f}",
        f"gradient norm             {result.grad_norm:.3f}, clipped at {config.train.max_grad_norm:g}",
        f"tokens                    {result.tokens} valid, {result.tokens_computed} computed",
        f"adapters that moved       {halves['B']} of {len(before) // 2} B, {halves['A']} of {len(before) // 2} A",
    ]


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _others_equal(batch: Batch, noisy: Tensor) -> bool:
    others = torch.ones(len(noisy.flatten(0, 1)), dtype=torch.bool)
    others[batch.target_index] = False
    return torch.equal(noisy.flatten(0, 1)[others], batch.latents.flatten(0, 1)[others])


def main() -> int:
    """Write the blocks into the page."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        write_tiny_pipeline(base, PROMPTS)
        blocks = iter(stations(Path(folder), base))
    PAGE.write_text(
        BLOCK.sub(lambda _: f"```text\n{next(blocks)}```", PAGE.read_text(encoding="utf-8")), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
