"""The text encoder beside the training: embeddings that the cache does not hold (`cache.text: recompute`).

Promise: what is embedded is what the caching pass stores on the same device, bit for bit, of controls that are as they
were scanned. Cost: the text encoder's memory on `cache.text_device`; its time for each sample of each step, and reading
the controls again, where it sees them. Prompts without controls are kept, `MEMO` of them or as many as a step has.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from mixres.batch import TextEmbeds
from mixres.config.schema import Config
from mixres.data.records import EditRecord
from mixres.errors import UserError, WorkError
from mixres.models.family import ControlSizes, Family
from mixres.preprocessing.encode import text_inputs

MEMO = 32  # 0.5 GB of FLUX.2-dev's, which are the largest


class Prompted(Protocol):
    """What has a prompt: a record, digests of its files and the sizes of its controls."""

    @property
    def record(self) -> EditRecord: ...
    @property
    def digests(self) -> Sequence[str]: ...
    @property
    def control_sizes(self) -> ControlSizes: ...


def text_device(config: Config, device: torch.device, *, ranks: int) -> torch.device:
    """Where a rank that trains on `device` embeds its prompts.

    Raises:
        UserError: it is not there, or of several processes.
    """
    name = config.cache.text_device
    if name and name != "cpu":
        count = torch.cuda.device_count()
        if int(name.removeprefix("cuda:")) >= count:
            raise UserError(f"cache.text_device: there is no {name}, this machine has {count}: give another, or null")
        if ranks > 1:
            raise UserError(f"cache.text_device: {name} is for one process, {ranks} were started: set cpu or null")
    return torch.device(name) if name else device


class LiveTexts:
    """Embeds prompts as they are needed, on `text_device`. Weights are loaded with the first prompt, or by `load`.

    A process that gets a copy has no weights: it reads what `embed` needs.
    """

    def __init__(self, config: Config, family: Family, device: torch.device, *, ranks: int = 1) -> None:
        self._config, self._family, self.device, self._ranks = config, family, device, ranks
        self._encoders: Any = None
        self._memo: OrderedDict[str, TextEmbeds] = OrderedDict()
        self._most = max(MEMO, config.batch.samples_per_step + 1)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_encoders": None, "_memo": OrderedDict()}

    def load(self) -> None:
        """Load the text encoder, which stays.

        Raises:
            UserError: `cache.text_device` is not there.
            WorkError: there is not enough memory for it.
        """
        if self._encoders is None:
            self.device = text_device(self._config, self.device, ranks=self._ranks)
            dtype = getattr(torch, self._config.model.dtype)
            with self._enough_memory():
                self._encoders = self._family.load_encoders(dtype=dtype, device=self.device)
            self._encoders.register_modules(vae=None)

    def inputs(self, item: Prompted, prompt: str) -> Mapping[str, Any]:
        """The arguments of `embed`.

        Raises:
            WorkError: a control has changed since the scan.
        """
        seen = text_inputs(self._config, self._family, item.record, item.digests, item.control_sizes)
        return {"prompt": prompt, **seen}

    def embed(self, inputs: Mapping[str, Any]) -> TextEmbeds:
        """The embeddings, on the CPU as those of the cache.

        Raises:
            WorkError: there is not enough memory.
        """
        prompt, alone = inputs["prompt"], not inputs["controls"]
        if alone and prompt in self._memo:
            self._memo.move_to_end(prompt)
            return self._memo[prompt]
        self.load()
        with self._enough_memory(), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            text = self._family.encode_prompt(self._encoders, **inputs)
        if alone:
            self._memo[prompt] = text
            if len(self._memo) > self._most:
                self._memo.popitem(last=False)
        return text

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            fix = "set another cache.text_device, or cache.text: float8"
            raise WorkError(f"cache.text: no room on {self.device} for the text encoder: {fix}") from error


class TextsOf:
    """See `mixres.data.loader.Texts`: those of `items` by their positions."""

    def __init__(self, live: LiveTexts, items: Sequence[Prompted]) -> None:
        self._live, self._items = live, items

    def inputs(self, index: int, *, dropped: bool) -> Mapping[str, Any]:
        """As `LiveTexts.inputs`."""
        item = self._items[index]
        return self._live.inputs(item, "" if dropped else item.record.prompt)

    def embed(self, inputs: Mapping[str, Any]) -> TextEmbeds:
        """As `LiveTexts.embed`."""
        return self._live.embed(inputs)
