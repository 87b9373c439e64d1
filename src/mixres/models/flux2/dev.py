"""FLUX.2-dev: Mistral Small 3 as its text encoder, and guidance as an input of the transformer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import Flux2Pipeline
from transformers import AutoTokenizer, Mistral3Config, Mistral3ForConditionalGeneration

from mixres.models.family import EmbeddedGuidance
from mixres.models.flux2.family import Flux2Klein
from mixres.models.id_family import TEXT_TOKENS


class Flux2Dev(Flux2Klein):
    """The stock `Flux2Pipeline`, which puts a system message before each prompt."""

    pipeline_class = Flux2Pipeline
    stock_bases: ClassVar[tuple[str, ...]] = ("black-forest-labs/FLUX.2-dev",)
    # With Mistral's own tokenizer the system message has 28 tokens, and its markers have 5; what is over is cut.
    max_prompt_tokens = TEXT_TOKENS - 40
    stock_configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "transformer/config.json": {},
        "text_encoder/config.json": {"text_config": {"hidden_size": 5120}},
        "scheduler/scheduler_config.json": {},
    }

    def embedded_guidance(self) -> EmbeddedGuidance | None:
        """See `Family`. In training as in diffusers' commands, musubi-tuner and ai-toolkit."""
        return EmbeddedGuidance(training=1.0, sampling=4.0)

    def own_parts(self, folder: Path, names: Sequence[str]) -> dict[str, Any]:
        """The tokenizer: the base's `PixtralProcessor` needs torchvision for images, of which it is shown none."""
        return {"tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer")} if "tokenizer" in names else {}

    def encoding_environment(self) -> str:
        """How the text encoder attends: prompts are padded on the left, and what it makes of padding hangs on that."""
        config = Mistral3Config.from_dict(self._config("text_encoder/config.json"))
        config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
        with torch.device("meta"):
            encoder = Mistral3ForConditionalGeneration(config)
        return str(encoder.config.text_config._attn_implementation)
