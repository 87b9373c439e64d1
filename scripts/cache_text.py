"""What each choice of `cache.text` costs: docs/results/cache_text.json, and its table in docs/cache.md.

    nice python scripts/cache_text.py    # measure; some ten minutes of one core
    python scripts/page_numbers.py       # the pages, from the results

On the tiny base and the quickstart's data, in bfloat16: bytes on disk, the change of the velocity on held-out samples,
held-out losses of short trainings with the same seeds, and processor time of a step, each choice in turn. At the
shape of Qwen-Image-Edit by formula.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

RESULTS = REPOSITORY / "docs" / "results" / "cache_text.json"
CHOICES = ("bfloat16", "float8", "recompute")
SEEDS, STEPS, TIMED, SIGMAS = (0, 1, 2), 24, 12, (0.2, 0.5, 0.8)
# One sample of Qwen-Image-Edit: two images of 1024 x 1024 pixels, 1400 text tokens; and weights of the text encoder's
# language model and of the transformer.
IMAGE_TOKENS, TEXT_TOKENS, ENCODER, TRANSFORMER = 8192, 1400, 7.6e9, 20.4e9


def config_of(root: Path, text: str, name: str, **keys: Any) -> Any:
    from mixres.config.load import load_config

    words = {
        "data.train": root / "data" / "train",
        "data.held_out": root / "data" / "held_out",
        "cache.cache_dir": root / text,
        "logging.output_dir": root / name,
        "model.pretrained_model_name_or_path": REPOSITORY / "src" / "mixres" / "assets" / "tiny_base",
        "model.dtype": "bfloat16",
        "train.max_train_steps": STEPS,
        "evaluate.every": 10_000,  # at both ends
        "evaluate.sigmas": list(SIGMAS),
        "sample.every": 0,
        **({} if text == "bfloat16" else {"cache.text": text}),
        **keys,
    }
    return load_config(REPOSITORY / "configs" / "quickstart.yaml", [f"{key}={value}" for key, value in words.items()])


def velocities(config: Any, family: Any, encoded: Any, transformer: Any) -> Iterator[Any]:
    """The predicted velocity of each held-out sample at each sigma, from the noise that all choices share."""
    import torch

    from mixres.data.plan import Microbatch
    from mixres.diffusion.flow_matching import fixed_flow_sample
    from mixres.training.setup import build_objective

    objective, dataset = build_objective(config, family), encoded.dataset(encoded.held_out, "packed")
    with torch.no_grad():
        for position, item in enumerate(encoded.held_out):
            batch = dataset.batch(Microbatch((position,), (1.0,)))
            for sigma in SIGMAS:
                flow = fixed_flow_sample(batch, keys=[item.noise_key], sigma=sigma, dtype=objective.dtype)
                yield objective.predict(transformer, batch, flow).double()


def held_out_losses(root: Path, text: str, seed: int) -> list[float]:
    """Of a short training, at its beginning and its end."""
    from accelerate.state import AcceleratorState

    from mixres.training.trainer import train

    AcceleratorState._reset_state(True)
    config = config_of(root, text, f"run-{text}-{seed}", **{"train.seed": seed})
    train(config)
    lines = map(json.loads, (Path(config.logging.output_dir) / "metrics.jsonl").read_text().splitlines())
    return [line["eval/loss"] for line in lines if "eval/loss" in line]


def step_seconds(root: Path, found: dict[str, Any]) -> dict[str, list[float]]:
    """Processor time of reading and computing the same steps, each choice in turn."""
    from accelerate.state import AcceleratorState

    from mixres.training.setup import build_loader, build_plan
    from mixres.verification.setup import one_process, set_up, step_seconds as stepped

    AcceleratorState._reset_state(True)
    config, family, _ = found[CHOICES[0]]
    trained = set_up(config, family, one_process(config, "bench"))
    plans = {text: build_plan(config, encoded, world_size=1) for text, (config, _, encoded) in found.items()}
    loaders = {
        text: build_loader(config, encoded, plans[text], rank=0, first=0, workers=0)
        for text, (config, _, encoded) in found.items()
    }
    seconds: dict[str, list[float]] = {text: [] for text in CHOICES}
    for step in range(TIMED):
        for text in CHOICES[step % 3 :] + CHOICES[: step % 3]:
            planned, began = plans[text].step(step), time.process_time()
            batches = [next(loaders[text]) for _ in planned.ranks[0]]
            divisor = trained.objective.divisor(planned.samples, planned.target_tokens)
            stepped(trained, batches, count=len(batches), step=step, divisor=divisor)
            seconds[text].append(time.process_time() - began)
    return seconds


def bytes_at_full_size() -> dict[str, int]:
    image, text = 128 * IMAGE_TOKENS, 2 * 3584 * TEXT_TOKENS
    return {"bfloat16": image + text, "float8": image + text // 2 + 2 * TEXT_TOKENS, "recompute": image}


def measure(root: Path) -> dict[str, Any]:
    """Everything; what is in the folder from an earlier run is not encoded again."""
    import torch

    from mixres.preprocessing.fill import encode_all, family_of
    from mixres.quickstart.data import write_demo
    from mixres.verification.setup import versions

    torch.set_num_threads(1)
    write_demo(root / "data")
    found: dict[str, Any] = {}
    for text in CHOICES:
        config = config_of(root, text, "run")
        family = family_of(config)
        found[text] = config, family, encode_all(config, family, device=torch.device("cpu"))
    held = {text: encoded.cache.held() for text, (_, _, encoded) in found.items()}
    samples = len(found[CHOICES[0]][2].train) + len(found[CHOICES[0]][2].held_out)
    transformer = found[CHOICES[0]][1].load_transformer(dtype=torch.bfloat16, device="cpu").eval()
    own = {text: list(velocities(*found[text], transformer)) for text in CHOICES}
    seconds = step_seconds(root, found)
    losses = {text: [held_out_losses(root, text, seed) for seed in SEEDS] for text in CHOICES[:2]}
    # The same bits as from embeddings that are stored: one seed shows it.
    losses[CHOICES[2]] = [held_out_losses(root, CHOICES[2], SEEDS[0])]
    return {
        "versions": versions(),
        "samples": samples,
        "steps": STEPS,
        "timed_steps": TIMED,
        "bytes_a_sample": {text: sum(sizes.values()) / samples for text, sizes in held.items()},
        "bytes_at_full_size": bytes_at_full_size(),
        "velocity_error": {text: relative_errors(own[text], own[CHOICES[0]]) for text in CHOICES},
        "held_out_loss": losses,
        "processor_seconds_a_step": seconds,
        # Of a forward pass of the text encoder against forward, recomputed forward and backward of the transformer.
        "text_flops_at_full_size": ENCODER * TEXT_TOKENS / (4 * TRANSFORMER * (IMAGE_TOKENS + TEXT_TOKENS)),
    }


def relative_errors(own: Sequence[Any], exact: Sequence[Any]) -> dict[str, float]:
    """Of the velocities: ||v' - v|| / ||v||, their mean and the largest."""
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(own, exact, strict=True)]
    return {"mean": statistics.fmean(errors), "largest": max(errors)}


def table(found: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [
        "| `cache.text` | bytes a sample, tiny base | at 1 MP with a control | error of the velocity (largest) | "
        "held-out loss against bfloat16 | processor time of a step |",
        "|---|---|---|---|---|---|",
    ]
    exact, times = found["held_out_loss"]["bfloat16"], found["processor_seconds_a_step"]
    for text in CHOICES:
        error, losses = found["velocity_error"][text], found["held_out_loss"][text]
        changes = [f"{own[-1] / other[-1] - 1:+.3%}" for own, other in zip(losses, exact, strict=False)]
        change = "the same bits" if losses == exact[: len(losses)] else ", ".join(changes)
        low, ratio, high = statistics.quantiles(a / b for a, b in zip(times[text], times["bfloat16"], strict=True))
        name = "null" if text == "bfloat16" else text
        cells = (
            name,
            f"{found['bytes_a_sample'][text] / 1e3:.1f} kB",
            f"{found['bytes_at_full_size'][text] / 1e6:.2f} MB",
            f"{error['mean']:.2%} ({error['largest']:.2%})",
            "-" if text == "bfloat16" else change,
            "1" if text == "bfloat16" else f"{ratio:.2f} ({low:.2f} to {high:.2f})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for data, caches and runs (a temporary one)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = json.dumps(measure(given.folder or Path(folder)), indent=1)
    RESULTS.write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
