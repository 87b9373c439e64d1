"""Memory of a training step on one device, counted before any weight is loaded.

Promise: bytes of the configured model with its adapters, precision, quantisation and recomputation, for the largest
microbatch. No layer is known here by name, and no GPU is needed. Cost: seconds.

How. The model of `FakeRun` (see `rehearsal.py`, which also says what is not counted) runs forward and backward.

Equal blocks. Neighbouring blocks with equal parameters are a run, and each block of it adds the same bytes. Forward and
backward are counted with a few blocks of each run, and again with some more: the difference stands for all others.
Where every n-th block is recomputed (gradient checkpointing), runs grow by n blocks at a time. What is kept between
forward and backward and the peak of either are extended separately, which gives the figures of the whole model.

`inspect --rehearse` runs all blocks and the other phases, `inspect --measure` the real thing.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mixres.batch import Batch
from mixres.config.schema import Config
from mixres.geometry import Grid
from mixres.inspection.rehearsal import FakeRun
from mixres.inspection.storages import LiveStorages, bytes_of
from mixres.inspection.text_memory import TextMemory, text_memory
from mixres.models.blocks import block_lists, recompute_blocks, repeated_blocks
from mixres.models.family import Family
from mixres.verification.synthetic import SampleTokens, noise_batch

_GATHERED_BLOCKS = 2  # with fsdp2: the block at work, and the next
_KEPT_BLOCKS = 3  # of a run of equal ones: the first and the last may keep less than one between them
_PROBE = 64  # tokens of the microbatches by which the bytes of one token are found


class StepBytes(NamedTuple):
    """Bytes alive besides weights and gradients."""

    kept: int  # between forward and backward
    forward: int  # at the peak of the forward pass
    backward: int
    host: int = 0  # what the forward pass moves to host memory


class MemoryEstimate:
    """Of one configuration on this process's kind of device, for any microbatch.

    Raises:
        UserError: the base's configuration, the optimizer's class or an argument of it is wrong.
    """

    def __init__(self, config: Config, family: Family, *, ranks: int) -> None:
        self._config, self._family, self._run = config, family, FakeRun(config, family)
        self._model: Any = self._run.trained.transformer
        parameters, trained = list(self._model.parameters()), list(self._run.trained.parameters.values())
        self.trained, self.parameters = sum(p.numel() for p in trained), sum(p.numel() for p in parameters)
        with self._run.fake:
            gradients = [torch.empty_like(p) for p in trained]  # of the microbatches before this one
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        self._known = [*parameters, *gradients]
        blocks = repeated_blocks(self._model)
        self._blocks, self._runs = len(blocks), list(_runs_of_equal(self._model))
        train = config.train
        ranks = min(ranks, train.shard_size or ranks) if train.parallel == "fsdp2" else 1
        on_host = train.cpu_offload and ranks > 1
        self._parts = {name: 0 if on_host else -(-count // ranks) for name, count in self._run.resident.items()}
        largest = max(self._gathered_bytes(block) for block in blocks)
        self._parts["gathered"] = min(_GATHERED_BLOCKS, self._blocks) * largest if ranks > 1 else 0

    def figures(self, microbatch: Sequence[SampleTokens]) -> dict[str, Any]:
        """What `inspect.json` holds, for the largest microbatch."""
        train, (image_token, text_token) = self._config.train, self.token_bytes()
        offloaded, text = train.offload.activations, text_memory(self._config, self._family, microbatch)
        return {
            "device": self._run.device.type,
            "parallel": train.parallel,
            "gradient_checkpointing": train.gradient_checkpointing,
            "bytes": self.memory(microbatch, text),
            "host_bytes": self._run.host_bytes
            + (text.host_bytes if text else 0)
            + (self.count(self.batch(microbatch), True).host if offloaded else 0),
            "blocks": self._blocks,
            **({"text_encoder": text.figures()} if text else {}),
            "bytes_of_an_image_token_in_a_block": image_token,
            "bytes_of_a_text_token_in_a_block": text_token,
        }

    def memory(self, microbatch: Sequence[SampleTokens], text: TextMemory | None = None) -> dict[str, int]:
        """Bytes on each device, by what holds them; `text` is the encoder that stays, where one does.

        `gathered` are weights of blocks that fsdp2 puts together as they are used. `activations` are all that is alive
        besides, at the peak of forward and backward, with the configuration's own gradient checkpointing.
        """
        own, batch = self._config.train.gradient_checkpointing, self.batch(microbatch)
        counts = {setting: self.count(batch, setting) for setting in {True, False, own}}
        peaks = {setting: max(count.forward, count.backward) for setting, count in counts.items()}
        parts, beside = dict(self._parts), 0
        if text and text.shared:
            parts["text_encoder"], beside = text.weights, text.activations  # which are gone before the forward pass
        return {
            **parts,
            "activations": peaks[own],
            "activations_with_checkpointing": peaks[True],
            "activations_without_checkpointing": peaks[False],
            "total": sum(parts.values()) + max(peaks[own], beside),
        }

    def count(self, batch: Batch, checkpointing: bool | int) -> StepBytes:
        """Of the whole model: of one with short runs, and what each run adds as it grows to its length."""
        period = max(1, int(checkpointing))
        missing = [max(0, len(blocks) - _KEPT_BLOCKS) // period for _, blocks in self._runs]  # periods of each run
        short = [len(blocks) - count * period for (_, blocks), count in zip(self._runs, missing, strict=True)]
        base = np.array(self._step(batch, checkpointing, short))
        total = base.copy()
        for i, count in enumerate(missing):
            if count:
                longer = [length + period * (i == j) for j, length in enumerate(short)]
                total += count * (np.array(self._step(batch, checkpointing, longer)) - base)
        return StepBytes(*total.tolist())

    def token_bytes(self) -> tuple[int, int]:
        """Bytes that one more block keeps of an image token and of a text token where it is not recomputed."""
        short = [min(_KEPT_BLOCKS, len(blocks)) for _, blocks in self._runs]
        some = short.index(max(short))
        fewer = [length - (i == some) for i, length in enumerate(short)]

        def kept_by_a_block(image: int, text: int) -> int:
            batch = self.batch([((Grid(1, image, _PROBE),), text * _PROBE)])
            return self._step(batch, False, short).kept - self._step(batch, False, fewer).kept

        base = kept_by_a_block(1, 1)
        return round((kept_by_a_block(2, 1) - base) / _PROBE), round((kept_by_a_block(1, 2) - base) / _PROBE)

    def batch(self, microbatch: Sequence[SampleTokens]) -> Batch:
        """Samples without values."""
        with self._run.fake:
            return noise_batch(self._config, self._family, microbatch).to(self._run.device)

    def _step(self, batch: Batch, checkpointing: bool | int, lengths: Sequence[int]) -> StepBytes:
        """Forward and backward with so many blocks of each run, its last among them: patches hang hooks on it."""
        for stack, _ in self._runs:
            del stack[:]
        for (stack, blocks), length in zip(self._runs, lengths, strict=True):
            stack.extend([*blocks[: length - 1], blocks[-1]] if length else [])  # patches hang hooks on the last one
        self._model.disable_gradient_checkpointing()
        if checkpointing:
            recompute_blocks(self._model, every=int(checkpointing))
        train, host, device = self._config.train, [0], self._run.device
        autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=train.mixed_precision == "bf16", cache_enabled=False
        )
        offloaded = train.offload.activations and checkpointing
        saved = self._run.saving_on_host(host) if offloaded else nullcontext()
        with self._run.fake, LiveStorages(self._known, device=device) as storages:
            storages.add(value for value in vars(batch).values() if isinstance(value, Tensor))
            with autocast, saved:
                loss = self._run.trained.objective.loss_sum(self._model, batch, step=0)
            kept, forward = storages.live, storages.peak
            storages.peak = kept
            torch.autograd.backward(loss)
            return StepBytes(kept, forward, storages.peak, sum(host))

    def _gathered_bytes(self, block: nn.Module) -> int:
        if self._config.train.mixed_precision == "bf16":
            return 2 * sum(parameter.numel() for parameter in block.parameters())
        return bytes_of(block.parameters())


def _runs_of_equal(model: nn.Module) -> Iterator[tuple[nn.ModuleList, list[nn.Module]]]:
    """Each run of neighbours whose parameters are alike, and the list that holds them, in the order of the model."""

    def kind(block: nn.Module) -> list[Any]:
        return [(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()]

    for stack in block_lists(model):
        yield from ((stack, list(run)) for _, run in groupby(list(stack), key=kind))
