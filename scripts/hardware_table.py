"""Rehearse every recipe of configs/ but the quickstart: docs/hardware.json, and make the table of what fits where.

    python scripts/hardware_table.py    # rehearse what docs/hardware.json lacks
    python scripts/page_numbers.py      # the pages, from the results

No weights, no data and no GPU are needed. A rehearsal takes some 15 s of processor time; each is written as it is done,
so the script can be stopped and run again. Delete docs/hardware.json to rehearse all of them.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))
from mixres.inspection.fitting import with_more_blocks  # noqa: E402

RESULTS = REPOSITORY / "docs" / "hardware.json"
MEMORY = (12, 16, 24, 48, 80, 141)  # GB
RANKS = (1, 8, 64)
SHORT = {
    "train.gradient_checkpointing=true": "recompute",
    "train.parallel=fsdp2": "fsdp2",
    "train.cpu_offload=true": "cpu_offload",
    "model.quantize=int8": "int8",
    "train.offload.activations=true": "activations",
}


def rehearsals(recipe: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each setting of a recipe that the table may need, and what rehearses it."""
    from mixres.config.load import load_config
    from mixres.inspection.fitting import climb, ladders, rehearse_quickly
    from mixres.models.registry import load_family
    from mixres.verification.synthetic import largest_microbatch

    config = load_config(recipe, [])
    family = load_family(config.model.family, config.model.pretrained_model_name_or_path, synthetic=True)
    microbatch = largest_microbatch(config, family)

    def later(ranks: int, own: Any, samples: Any) -> Any:
        return partial(rehearse_quickly, own, family, samples, ranks=ranks, microbatches=2)

    yield {"changes": [], "split": False, "ranks": 1}, later(1, config, microbatch)
    seen = set()
    for ranks in RANKS:
        for steps in ladders(config, microbatch, ranks):
            changes: list[str] = []
            for written, work in climb(config, steps, microbatch, partial(later, ranks)):
                changes.append(written)
                split = "train.parallel=fsdp2" in changes
                row = {"changes": list(changes), "split": split, "ranks": ranks if split else 1}
                if str(row) not in seen:
                    seen.add(str(row))
                    yield row, work


def measure() -> None:
    """Rehearse what the results lack."""
    from mixres.verification.setup import versions

    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    found["versions"] = versions()
    known = {(row["recipe"], str(row["changes"]), row["ranks"]) for row in found["rows"]}
    for recipe in sorted(path for path in (REPOSITORY / "configs").glob("*.yaml") if path.stem != "quickstart"):
        for row, work in rehearsals(recipe):
            if (recipe.stem, str(row["changes"]), row["ranks"]) in known:
                continue
            outcome = work()
            kept = ("peak_bytes", "peak_phase", "host_bytes", "wire_bytes", "flops", "tokens", "blocks", "block_bytes")
            found["rows"].append({"recipe": recipe.stem, **row, **{name: outcome[name] for name in kept}})
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            sys.stderr.write(f"{recipe.stem} {row} {outcome['peak_bytes'] / 1e9:.2f} GB\n")


def cell(rows: Sequence[dict[str, Any]], ranks: int, memory: int) -> str:
    """The first setting that fits so many GB: as it is, then without loss of speed, then split, then the others."""

    def cost(row: dict[str, Any]) -> int:
        slower = any(change.startswith(("model.", "train.offload")) for change in row["changes"])
        return 3 if slower else 2 if row["split"] else 1 if row["changes"] else 0

    usable = [row for row in rows if row["ranks"] == ranks or not row["split"]]
    order = sorted(usable, key=cost)  # stable: ladders stay in order
    for row in order:
        peak, changes = row["peak_bytes"], [SHORT.get(change, change) for change in row["changes"]]
        if peak > memory * 10**9:
            continue
        names = ["1 sample" if change.startswith("batch.max_tokens") else change for change in changes]
        slots = [name for name in names if name.startswith("train.offload.blocks")]
        if slots:
            names[names.index(slots[0])] = f"blocks {with_more_blocks(row, memory * 10**9)[0]}"
        return f"{', '.join(names) or 'as it is'}"
    return "no"


def table(found: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [
        "| recipe | ranks | " + " | ".join(f"{size} GB" for size in MEMORY) + " |",
        "|---" * (2 + len(MEMORY)) + "|",
    ]
    for recipe in sorted({row["recipe"] for row in found["rows"]}):
        rows = [row for row in found["rows"] if row["recipe"] == recipe]
        for ranks in RANKS:
            cells = [cell(rows, ranks, size) for size in MEMORY]
            lines.append(f"| `{recipe}` | {ranks} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    measure()
