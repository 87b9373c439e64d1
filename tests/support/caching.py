"""Caching passes over a copy of the small data set, which a test may change."""

import re
from pathlib import Path

import pytest
import torch

from mixres.batch import Sample
from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.data.scan import ScannedRecord
from mixres.errors import UserError
from mixres.preprocessing.fill import CachedData, encode_all, run_cache
from mixres.preprocessing.training_data import usable_records
from support.family_cases import with_family

TARGETS, CONTROLS = "training_images", "control_images"


class Caching:
    """One pass after the other over `data`, into `cache`."""

    def __init__(self, file: Path, data: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file, self.data, self.cache, self.run, self.capsys = file, data, cache, data / "run", capsys

    def words(self) -> list[str]:
        folders = [f"data.{part}={self.data / part}" for part in ("train", "held_out")]
        return [*folders, f"cache.cache_dir={self.cache}", f"logging.output_dir={self.run}"]

    def config(self, *overrides: str) -> Config:
        return load_config(self.file, [*self.words(), *overrides])

    def __call__(self, *overrides: str) -> tuple[int, int]:
        """How many entries were encoded and found, as the run logs it."""
        run_cache(self.config(*overrides))
        counts = re.search(r"(\d+) encoded, (\d+) found\n", self.output())
        assert counts
        return int(counts[1]), int(counts[2])

    def encoded(self, *overrides: str) -> CachedData:
        return encode_all(*with_family(self.config(*overrides)), device=torch.device("cpu"))

    def samples(self, *overrides: str) -> list[Sample]:
        """What the cache then holds for the training records."""
        encoded = self.encoded(*overrides)
        self.output()  # the next pass counts its own
        return [encoded.cache.read(sample.key, name="sample") for sample in encoded.train]

    def usable(self, *overrides: str, is_main: bool = True) -> tuple[list[ScannedRecord], list[ScannedRecord]]:
        found = usable_records(*with_family(self.config(*overrides)), is_main=is_main)
        return found.train, found.held_out

    def problems(self, *overrides: str, is_main: bool = True) -> list[str]:
        """What a run is refused for, with paths relative to the data."""
        with pytest.raises(UserError) as caught:
            self.usable(*overrides, is_main=is_main)
        return [message.replace(f"{self.data}/", "") for message in caught.value.messages]

    def output(self) -> str:
        return self.capsys.readouterr().out

    # The files

    def files(self, folder: str = TARGETS, part: str = "train", suffix: str = ".png") -> list[Path]:
        return sorted((self.data / part / folder).glob(f"*{suffix}"))

    def first(self, folder: str = TARGETS, part: str = "train", suffix: str = ".png") -> Path:
        return self.files(folder, part, suffix)[0]

    def pair(self, target: Path) -> list[Path]:
        """Target, caption and controls."""
        controls = (target.parents[1] / CONTROLS).glob(f"{target.stem}[._]*")
        return [target, target.with_suffix(".txt"), *controls]

    def keep_few(self, train: int = 2) -> None:
        """So many training pairs and one held-out pair, where everything is encoded anew."""
        for target in [*self.files()[train:], *self.files(part="held_out")[1:]]:
            for file in self.pair(target):
                file.unlink()
