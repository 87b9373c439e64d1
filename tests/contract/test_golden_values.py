"""Numbers recorded once: the same data, configuration and seed give the same keys, plans, losses and weights."""

from pathlib import Path
from typing import Any

from contract.record import LORA, assert_same_lora, assert_same_metrics, entries, json_lines, plans


def test_the_plans_of_the_recipes(golden: dict[str, Any]) -> None:
    assert plans() == golden["plans"]


def test_the_keys_of_the_cache(finished: Path, golden: dict[str, Any]) -> None:
    """Where torchvision is installed transformers resizes differently, and the keys are others on purpose."""
    assert entries(finished / "cache") == golden["numbers"]["entries"]


def test_the_losses_of_a_run(finished: Path, golden: dict[str, Any]) -> None:
    assert_same_metrics(json_lines(finished / "run" / "metrics.jsonl"), golden["numbers"])


def test_the_lora_of_a_run(finished: Path, golden: dict[str, Any]) -> None:
    assert_same_lora(finished / "run" / LORA, golden["numbers"])
