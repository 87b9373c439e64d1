"""Write the numbers of the README and of docs/*.md: what was measured, what is computed, and constants of the code.

    python scripts/page_numbers.py    # rewrites the pages from docs/results, docs/hardware.json and the code

A number in prose has a comment before it, which a reader does not see: `<!-- SOURCE FORM -->0.81`, or with a divisor
`<!-- SOURCE /1e9 FORM -->47.2`. FORM is Python's. SOURCE, its parts joined by dots, is one of

- a function of `SOURCES` here, then keys: `bench.8192.packed.ratio`;
- a file of docs/results, then keys: `report.page_mb`;
- a configuration key's default, `default.sample.steps`, or its value in a recipe, `recipe.z_image_lora.sample.steps`;
- what a module of mixres holds: `mixres.training.run_folder._LOCK_WAIT_S`;
- a file that has the number in it, as a literal, such as a bound that a test asserts: `tests/training/test_ranks.py`.

Tables stand between `<!-- NAME: begin -->` and `<!-- NAME: end -->`; `BLOCKS` has what writes them. Two comments name
numbers that are not ours: `<!-- cited -->` stands before a number of others, or on a line of its own before a table of
them, whose source the text names; `<!-- given -->` before a number that a sentence assumes, such as the size of a card.
"""

import ast
import importlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))
DOCS = REPOSITORY / "docs"
UNWRITTEN = ("log.md", "configuration.md")  # the log is dated prose, the other has a script of its own
VALUE = r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"
MARK = re.compile(rf"<!-- ([\w./-]+?)(?: /(\S+))? (\S+) -->({VALUE})")
BLOCK = re.compile(r"<!-- (?P<name>[a-z][\w ]*): begin -->(?P<text>.*?)<!-- (?P=name): end -->", re.DOTALL)
UNIT = (
    r"(?:%|per cent\b|dB\b|[kKMGT]i?B\b|[mu]?s\b|seconds?\b|minutes?\b|hours?\b|times\b|x\b(?! ?[\dN])|G?FLOPS?\b|"
    r"(?:images|tokens|samples)/s\b|[mb]illion\b|px\b)"
)
NUMBER = re.compile(rf"(?<![\w.@-])(?:\d[\d,]*\.\d+(?!\.\d)(?:e-?\d+)?|\d[\d.]*e-?\d+|\d[\d,]*(?= ?{UNIT}))")
# Names of models, licences, packages and papers with a number in them.
NAMES = re.compile(
    r"(?:Qwen-Image-|FLUX\.|Z-Image-|diffusers |[Pp]ython |[Tt]orch |Apache |Apache-|CC BY |arXiv |Linux |musubi-tuner "
    r"\(|SD |Pillow |lycoris-lora |mixres |at \w{6,}(?: \()?)\d[\d.]*"
)


@cache
def stored(name: str) -> Any:
    """A file of results, as JSON."""
    path = DOCS / "hardware.json" if name == "hardware" else DOCS / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


# --- Values: what a source's name gives ------------------------------------------------------------------------------


SOURCES: dict[str, Callable[[], Any]] = {}
SIDES = (256, 512, 768, 1024, 1328)


def source(function: Callable[[], Any]) -> Callable[[], Any]:
    """Decorator: comments may name the function; it is called once."""
    SOURCES[function.__name__] = cache(function)
    return SOURCES[function.__name__]


@source
def bench() -> Any:
    """By budget: the report, its rows by their names."""
    found = stored("bench")
    return {
        tokens: own | {row["name"]: row for row in own["rows"]} for tokens, own in found.items() if tokens.isdigit()
    }


@source
def exact() -> Any:
    """The errors of `mixres verify` by precision and layout; `over`: those of the samples alone, as a multiple."""
    from mixres.verification.verify import ROUNDING_FACTOR

    found: dict[str, Any] = {}
    for file, dtype in (("verify", "float32"), ("verify_bfloat16", "bfloat16")):
        for case in (case for case in stored(file)["cases"] if case["dtype"] == dtype):
            over = max(case[name] / bar * ROUNDING_FACTOR for name, bar in case["bar"].items())
            found.setdefault(dtype, {})[case["layout"]] = case | {"over": over}
    return found


@source
def adapters() -> Any:
    """Parameters of adapters on the attention of Qwen-Image, by their settings; and the costs that were measured."""
    from mixres.models import lora
    from mixres.models.registry import load_family

    family = load_family(None, "Qwen/Qwen-Image", synthetic=True)
    model: Any = family.transformer_skeleton()
    patterns = lora.expanded(["attention"], family.lora_presets)
    layers = list(lora._chosen(model, patterns, family.untrained_modules(model)).values())

    def size(kind: Any, r: int, factor: int = -1) -> int:
        given = {"r": r, "factor": factor, "decompose_both": False}
        return sum(math.prod(x) for one in layers for x in lora.adapter_shapes(kind, one, given).values())

    settings = {"LoRA, `r: 16`": ("lora", 16), "DoRA, `r: 16`": ("dora", 16), "LoHa, `r: 8`": ("loha", 8),
                "LoHa, `r: 16`": ("loha", 16), "LoKr, `factor: 16`, `r: 16`": ("lokr", 16, 16),
                "LoKr, `factor: 8`, `r: 16` (defaults)": ("lokr", 16, 8),
                **{f"LoKr, `factor: {f}`, `r: 4096`": ("lokr", 4096, f) for f in (16, 8, 4)}}  # fmt: skip
    return {"layers": len(layers), "sizes": {name: size(*own) for name, own in settings.items()}}


@source
def shift() -> Any:
    """How sigma is shifted, by the side of a square target in pixels; of FLUX.2 by steps first."""
    from mixres.diffusion.flow_matching import resolution_shift
    from mixres.models.registry import load_family

    def by_side(base: str, steps: int | None = None) -> dict[str, float]:
        constants = load_family(None, base, synthetic=True).flow_shift(steps)
        return {str(side): resolution_shift((side // 16) ** 2, constants) for side in SIDES}

    return {
        "qwen": by_side("Qwen/Qwen-Image"),
        "kontext": by_side("black-forest-labs/FLUX.1-Kontext-dev"),
        "flux2": {str(steps): by_side("black-forest-labs/FLUX.2-klein-base-4B", steps) for steps in (4, 28, 50)},
    }


@source
def parameters() -> dict[str, int]:
    """Of transformers that need no weights to be counted."""
    from mixres.models.registry import load_family

    bases = {"tiny": str(REPOSITORY / "src/mixres/assets/tiny_base"), "qwen": "Qwen/Qwen-Image-Edit"}
    models: dict[str, Any] = {
        name: load_family(None, base, synthetic=name != "tiny").transformer_skeleton() for name, base in bases.items()
    }
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    blocks = models["qwen"].transformer_blocks
    linear = sum(m.weight.numel() for block in blocks for m in block.modules() if type(m).__name__ == "Linear")
    copied = sum(m.weight.numel() for m in blocks[0].modules() if type(m).__name__ == "Linear")
    return counts | {"qwen_rounded": linear, "qwen_others": counts["qwen"] - linear, "qwen_block": copied}


@source
def entry() -> dict[str, float]:
    """Bytes of a token in the cache and of a block's inputs, for Qwen-Image-Edit; and of one prompt for FLUX.2-dev."""
    from mixres.models.registry import load_family

    models = {
        base: load_family(None, base, synthetic=True)
        for base in ("Qwen/Qwen-Image-Edit", "black-forest-labs/FLUX.2-dev")
    }
    qwen, flux2 = (family.transformer_skeleton().config for family in models.values())
    tokens = importlib.import_module("cache_text")
    inputs = 2 * (tokens.TEXT_TOKENS + tokens.IMAGE_TOKENS) * qwen.num_attention_heads * qwen.attention_head_dim
    return {
        "image_token": 2 * qwen.in_channels,
        "text_token": 2 * qwen.joint_attention_dim,
        "block_inputs": inputs,
        "blocks_inputs": inputs * qwen.num_layers,
        "flux2_prompt": 2 * models["black-forest-labs/FLUX.2-dev"].padded_text * flux2.joint_attention_dim,
    }


@source
def kontext_stretch() -> float:
    """How far one of Kontext's sizes changes an aspect that lies halfway between two of them, as a ratio."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    aspects = sorted(width / height for width, height in PREFERRED_KONTEXT_RESOLUTIONS)
    return max(max((a + b) / 2 / a, b / ((a + b) / 2)) - 1 for a, b in itertools.pairwise(aspects))


@source
def merge() -> dict[str, float]:
    """What rounding a merge costs; of the outputs the largest."""
    found = stored("merge")
    return {"weights": found["weights"], "largest": max(found["outputs"])}


@source
def positions() -> Any:
    """Of the figure on positions, the smallest and the largest error of the samples that are wrong."""
    found = stored("positions")
    return {name: {"low": min(own[1:]), "high": max(own[1:]), "largest": max(own)} for name, own in found.items()}


@source
def mixed_batch() -> Any:
    """Of the figures on buckets and batches."""
    import mixed_batch_figures as figures

    numbers = {name: float(text.strip("%").replace(",", "")) for name, text in figures.numbers().items()}
    return numbers | {"lost": max(figures.bucket_crop(source).lost for source in figures.SIZES)}


@source
def default() -> Any:
    """The defaults of the configuration."""
    from mixres.config.problems import defaults

    return defaults()


@source
def recipe() -> Any:
    """The recipes of configs/."""
    from mixres.config.load import load_config

    return {path.stem: load_config(path, []).model_dump() for path in (REPOSITORY / "configs").glob("*.yaml")}


def value_of(source: str, written: str) -> Any:
    """What a source gives. Of a file that has the number as a literal, the number as it is written.

    Raises:
        LookupError: there is no such source, or it has no such value.
    """
    if "/" in source:
        number = float(written.replace(",", ""))
        tree = ast.parse((REPOSITORY / source).read_text(encoding="utf-8"))
        literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        if not any(type(own) in (int, float) and own == number for own in literals):
            raise LookupError(f"{source} has no {written}")
        return number
    first, *parts = source.split(".")
    if first == "mixres":
        module, *names = next(
            [".".join([first, *parts[:n]]), *parts[n:]]
            for n in range(len(parts) - 1, 0, -1)
            if (REPOSITORY / "src" / first / Path(*parts[:n])).with_suffix(".py").exists()
        )
        return reduce(getattr, names, importlib.import_module(module))
    value = SOURCES[first]() if first in SOURCES else stored(first)
    for part in parts:
        value = value[int(part)] if isinstance(value, (list, tuple)) else value[part]
    return value


def rewritten(mark: re.Match[str]) -> str:
    """The comment, and behind it the value as it should stand there."""
    source, divisor, form, written = mark.groups()
    value = value_of(source, written)
    if "/" in source:
        return mark[0]
    if divisor or form.endswith("d"):
        value = value / float(divisor or 1)
        value = round(value) if form.endswith("d") else value
    text = re.sub(r"e([-+]?)0*(\d)", lambda m: f"e{m[1].strip('+')}{m[2]}", format(value, form))
    return mark[0][: -len(written)] + text


# --- Tables ----------------------------------------------------------------------------------------------------------


def ways(tokens: str) -> str:
    """Of `mixres bench` at a budget."""
    rows = []
    for row in bench()[tokens]["rows"]:
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})" if row["name"] != "one_by_one" else "1"
        rows.append((row["name"], ratio, f"{row['microbatches']:.1f}".removesuffix(".0"), f"{row['tokens_per_s']:,.0f}",
                     f"{row['useful_tokens_per_s']:,.0f}", f"{row['padding']:.1%}", f"{row['flops'] / 1e9:.1f}",
                     f"{row['peak_bytes'] / 1e6:.0f}"))  # fmt: skip
    heads = ("way", "time, of one by one (lowest to highest)", "microbatches a step", "tokens/s", "useful tokens/s",
             "padding", "GFLOP a step", "peak MB")  # fmt: skip
    found, rounds = stored("bench"), bench()[tokens]["rounds"]
    where = f"{found['date']}, {found['machine']['cores']} cores at a load of {found['load']}, {rounds} rounds."
    return f"{table(heads, rows)}\n\n{where}"


def adapter_table() -> str:
    """Parameters and bytes of a file in float32."""
    rows = [(name, f"{count / 1e6:.1f} M", f"{4 * count / 1e6:.0f} MB") for name, count in adapters()["sizes"].items()]
    return table(("", "parameters", "file"), rows)


def shift_table(base: str) -> str:
    """Factors by size; of FLUX.2 a row for each number of steps."""
    sizes = [f"{side} x {side}" for side in SIDES]
    found = shift()[base]
    if base == "flux2":
        names = {"4": "4 (distilled klein)"}
        rows = [(names.get(steps, steps), *(f"{x:.2f}" for x in own.values())) for steps, own in found.items()]
        return table(("steps", *sizes), rows)
    tokens = [str((side // 16) ** 2) for side in SIDES]
    return table(("target", *sizes), [("tokens", *tokens), ("factor", *(f"{x:.2f}" for x in found.values()))])


def offload_table() -> str:
    """Peaks and host memory of the rehearsals."""
    rows = []
    for own in stored("memory")["rows"].values():
        keys = dict(key.split("=") for key in own["keys"])
        if keys.get("model.lora") == "null":
            continue
        changed = [f"`{key.split('.')[-1]}: {value}`" for key, value in keys.items() if "offload." in key]
        host = f"{own['host_bytes'] / 1e9:.1f} GB" if own["host_bytes"] else ""
        base = keys.get("model.quantize", "bfloat16")
        rows.append((base, ", ".join(changed), f"{own['peak_bytes'] / 1e9:.1f} GB", host))
    return table(("base", "`train.offload`", "on the device", "in host memory"), rows)


def crop_table() -> str:
    """What buckets cut off, and what rounding costs here."""
    import mixed_batch_figures as figures

    heads = ("image", "its bucket", "cut off", "size in mixres", "aspect changes by")
    return table(heads, [row.strip("| ").split(" | ") for row in figures.crop_table()])


def size_table() -> str:
    """Sizes of targets, and of controls by the rule of areas."""
    from mixres.geometry import Size, control_size, target_size

    area, rows = default()["data"]["resize"]["target"]["max_pixels"], []
    for case, size in CASES.items():
        source = Size(*size)
        target = target_size(source, max_pixels=area, multiple_of=16)
        rows.append((case, str(source), str(target), str(control_size(source, area=area))))
    return table(("case", "image", "as target", "as such a control"), rows)


def by_script(name: str, results: str, function: str = "table") -> str:
    """The block that a script of its own makes of its results."""
    text: str = getattr(importlib.import_module(name), function)(stored(results))
    return text


CASES = {
    "a small square": (512, 512), "exactly the limit": (1024, 1024), "rounded up and down": (600, 392),
    "a photograph": (640, 427), "its mirror, upright": (427, 640), "a phone photograph": (4000, 3000),
    "a panorama, 8 to 1": (8000, 1000), "rounding alone suffices": (1025, 1023), "one token": (16, 16),
    "a screenshot": (1920, 1080),
}  # fmt: skip
BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {name: partial(lambda name: importlib.import_module("first_screen").tables()[name], name)
                  for name in ("comparison", "quickstart", "hardware")},
    "adapters.md": {"sizes": adapter_table},
    "buckets.md": {"buckets": partial(by_script, "bucket_benchmark", "buckets", "block")},
    "cache.md": {"cache throughput": partial(by_script, "cache_throughput", "cache_throughput"),
                 "million table": partial(by_script, "million_entries", "million"),
                 "text table": partial(by_script, "cache_text", "cache_text")},
    "data.md": {"sizes": size_table},
    "multi_resolution.md": {"crops": crop_table},
    "numerics.md": {f"bench {tokens}": partial(ways, tokens) for tokens in ("8192", "2048")},
    "settings.md": {"hardware table": partial(by_script, "hardware_table", "hardware"), "offload": offload_table,
                    "shift": partial(shift_table, "qwen"), "shift of flux2": partial(shift_table, "flux2")},
    "watching.md": {"report benchmark": partial(by_script, "report_benchmark", "report", "numbers")},
}  # fmt: skip


# --- Pages -----------------------------------------------------------------------------------------------------------


def pages() -> dict[str, Path]:
    """The README and the pages, by name."""
    found = {path.name: path for path in sorted(DOCS.glob("*.md")) if path.name not in UNWRITTEN}
    return {"README.md": REPOSITORY / "README.md", **found}


def written(name: str, text: str) -> str:
    """A page with all its blocks and numbers from their sources."""
    blocks = BLOCKS.get(name, {})
    found = [block["name"] for block in BLOCK.finditer(text)]
    if sorted(found) != sorted(blocks):
        raise LookupError(f"{name} has the blocks {found}, not {[*blocks]}")
    return MARK.sub(rewritten, BLOCK.sub(lambda own: renewed(own, blocks[own["name"]]), text))


def renewed(block: re.Match[str], write: Callable[[], str]) -> str:
    """The block with its comments."""
    return f"<!-- {(name := block['name'])}: begin -->\n\n{write()}\n\n<!-- {name}: end -->"


def unsourced(text: str) -> list[str]:
    """Numbers of a page that were measured or are bounds, and have no source."""
    for pattern in (BLOCK, re.compile(r"<!-- measured:.*?<!-- /measured -->", re.DOTALL)):
        text = pattern.sub(" ", text)
    text = re.sub(r"^```.*?^```", " ", text, flags=re.DOTALL | re.MULTILINE)
    parts = [part for part in re.split(r"\n\s*\n", text) if not re.search(r"^<!-- cited -->$", part, re.MULTILINE)]
    text = "\n\n".join(parts)
    text = re.sub(rf"<!-- (?:given|cited) -->{VALUE}", "N", MARK.sub("N", text))
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", " ", text)
    return NUMBER.findall(NAMES.sub(" ", text))


def main() -> None:
    left: Mapping[str, list[str]] = {}
    for name, path in pages().items():
        text = path.read_text(encoding="utf-8")
        if (new := written(name, text)) != text:
            path.write_text(new, encoding="utf-8")
            sys.stdout.write(f"{path}\n")
        left |= {name: own} if (own := unsourced(new)) else {}
    for name, numbers in left.items():
        sys.stdout.write(f"{name}: without a source: {', '.join(numbers)}\n")


if __name__ == "__main__":
    main()
