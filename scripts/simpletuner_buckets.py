"""What SimpleTuner's own code makes of the sizes of the benchmark's files, against ours: `simpletuner` of the results.

    python -m venv --system-site-packages /tmp/simpletuner
    /tmp/simpletuner/bin/python -m pip install --no-deps simpletuner
    /tmp/simpletuner/bin/python scripts/simpletuner_buckets.py

In an environment of its own, over one with mixres, after scripts/bucket_benchmark.py has written its pairs. Packages
that it imports for what no size depends on are stood in for where they are missing.
"""

import importlib.abc
import importlib.machinery
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))
from mixres.geometry import Size  # noqa: E402
from mixres.verification.bucket_rules import Fit, simpletuner  # noqa: E402

RESULTS = REPOSITORY / "docs" / "results" / "buckets.json"
UNUSED = ("torchvision", "trainingsample", "cv2", "imageio")
# Sides of a bucket's square and the alignment: the benchmark's, and those of a megapixel for files ten times as large.
SETTINGS = {"as trained": (None, 8, 1), "at a megapixel": (1024, 64, 10)}


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of `UNUSED` that are not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = name.partition(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec, __name__=spec.name)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None: ...


def theirs(sizes: list[Size], side: int, alignment: int) -> list[Fit]:
    """Of its `TrainingSample`, with `crop: false` and a resolution by area."""
    from simpletuner.helpers.image_manipulation.training_sample import TrainingSample
    from simpletuner.helpers.training.state_tracker import StateTracker

    backend = {"crop": False, "crop_style": "center", "resolution": side**2 / 1e6, "resolution_type": "area"}
    StateTracker.args = SimpleNamespace(aspect_bucket_alignment=alignment, aspect_bucket_rounding=2)
    StateTracker.get_args = staticmethod(lambda: StateTracker.args)
    StateTracker.get_data_backend_config = staticmethod(lambda name: backend)
    StateTracker.get_model = staticmethod(lambda: None)
    known: dict[float, Any] = {}
    StateTracker.get_resolution_by_aspect = staticmethod(lambda dataloader_resolution, aspect: known.get(aspect))
    StateTracker.set_resolution_by_aspect = staticmethod(
        lambda dataloader_resolution, aspect, resolution: known.update({aspect: resolution})
    )
    found = []
    for size in sizes:
        sample = TrainingSample(None, "files", image_metadata={"original_size": tuple(size)})
        bucket, scaled, _ = sample.calculate_target_size()
        found.append(Fit(Size(*scaled), Size(*bucket)))
    return found


def main() -> None:
    """Compare both on the training files of each data set."""
    sys.meta_path.append(StandIn())
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    rows = []
    for name in ("quickstart", "border"):
        files = sorted((REPOSITORY / "build" / "buckets" / name / "train" / "training_images").glob("*.png"))
        native = [Size(*Image.open(file).size) for file in files]
        for setting, (edge, alignment, scale) in SETTINGS.items():
            sizes = [Size(size.width * scale, size.height * scale) for size in native]
            side = edge or int((sum(size.width * size.height for size in native) / len(native)) ** 0.5)
            own, other = simpletuner(sizes, side, alignment), theirs(sizes, side, alignment)
            rows.append(
                {
                    "data": name,
                    "setting": setting,
                    "side": side,
                    "alignment": alignment,
                    "images": len(files),
                    "same_bucket": sum(a.bucket == b.bucket for a, b in zip(own, other, strict=True)),
                    "same_size": sum(a.scaled == b.scaled for a, b in zip(own, other, strict=True)),
                    **{
                        f"{key}_{who}": value
                        for who, fits in (("ours", own), ("theirs", other))
                        for key, value in (
                            ("buckets", len({fit.bucket for fit in fits})),
                            ("cropped", sum(fit.cropped > 0 for fit in fits)),
                            ("cropped_mean", sum(fit.cropped for fit in fits) / len(fits)),
                        )
                    },
                }
            )
    results["simpletuner"] = {"version": version("simpletuner"), "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
