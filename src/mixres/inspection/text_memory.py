"""Memory of the text encoder that stays beside the training with `cache.text: recompute`, before it is loaded.

Promise: bytes of its weights in `model.dtype`, and of what one prompt of so many tokens adds at the peak, counted by
running it on tensors without values, which costs it a mask (T, T) that a real prompt saves. Not counted: what the tower
for images takes beside its weights.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mixres.config.schema import Config
from mixres.inspection.storages import LiveStorages
from mixres.models.family import Family
from mixres.training.distributed import dist_env
from mixres.verification.synthetic import SampleTokens


class TextMemory(NamedTuple):
    """Bytes, and where they are."""

    device: str
    shared: bool  # it is the device that trains
    weights: int
    activations: int

    @property
    def host_bytes(self) -> int:
        """In host memory, beside a device that trains."""
        return self.weights + self.activations if self.device == "cpu" and not self.shared else 0

    def figures(self) -> dict[str, Any]:
        """What reports hold."""
        return {"device": self.device, "weights": self.weights, "activations": self.activations}


def text_memory(config: Config, family: Family, microbatch: Sequence[SampleTokens]) -> TextMemory | None:
    """For the longest prompt of the microbatch; None where embeddings are stored.

    Raises:
        UserError: the base's configuration cannot be had.
    """
    if config.cache.text != "recompute":
        return None
    own, dtype, named = dist_env().device, getattr(torch, config.model.dtype), config.cache.text_device
    skeletons = family.text_encoder_skeletons()
    tokens = max(text for _, text in microbatch)
    weights = sum(dtype.itemsize * parameter.numel() for part in skeletons for parameter in part.parameters())
    activations = max(_activations(part, dtype, tokens) for part in skeletons)
    # A device that is named is one beside, and `cpu` the host, as a run on CUDA has it: this machine may only plan one.
    shared = named in (None, f"cuda:{own.index or 0}")
    return TextMemory(named or str(own), shared, weights, activations)


@torch.no_grad()
def _activations(skeleton: nn.Module, dtype: torch.dtype, tokens: int) -> int:
    places = getattr(skeleton.config, "max_position_embeddings", None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in skeleton.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        held = [*skeleton.parameters(), *skeleton.buffers()]
        ids = torch.zeros(1, min(tokens, places or tokens), dtype=torch.long)
        mask = torch.ones_like(ids)
        with LiveStorages(held) as storages:
            skeleton.eval()(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            return int(storages.peak)
