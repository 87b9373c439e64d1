"""The interface of a model family: one diffusion transformer, its encoders and its stock pipeline, bound to a base.

Everything above `models/` asks this object and knows no layer name. `docs/adding_a_model.md` has the checklist for a
new family; `registry.py` is the one place that chooses.

Two rules decide most questions. The stock pipeline is right: sizes of controls, prompt template, normalisation of
latents and their order come from it, by calling it where it has a method for it. Training gets what sampling gets:
what can be changed about an image is one argument of `encode` and of sampling alike.

Legend: B samples, S image tokens, T text tokens, P channels of a token, D width of the text embeddings.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from mixres.batch import Batch, Sample, TextEmbeds
from mixres.geometry import Grid, Size
from mixres.models.quantize import Method

AreaRule = int | Literal["target"]  # pixels of a control image, or those of its target


class ControlSizes(NamedTuple):
    """What VAE and text encoder are given: the size of each control of one sample, in the controls' order."""

    vae: tuple[Size, ...] = ()
    text: tuple[Size, ...] = ()


class EmbeddedGuidance(NamedTuple):
    """Stock values of the guidance that a transformer takes as an input: one forward call a step, without a prompt to
    lead away from."""

    training: float
    sampling: float


class PatchState(NamedTuple):
    """How much of a transformer is patched."""

    processors: int  # attention processors that are ours
    blocks: int
    positions: bool  # whether the position module is ours

    @property
    def whole(self) -> bool:
        return self.positions and self.processors == self.blocks


class Family(Protocol):
    """A family bound to the base at `path` (a folder, or a repository of the Hub at `revision`).

    Methods that need a file of the base raise UserError, one line a problem, where it cannot be had. Stock pipelines
    and transformers have no useful types, so they are `Any` and `nn.Module` here.
    """

    name: ClassVar[str]  # as in `model.family`, LoRA files and reports; never changes
    pipeline_class: ClassVar[type[Any]]  # of diffusers, by whose name in model_index.json the family is chosen
    stock_bases: ClassVar[tuple[str, ...]]  # repositories whose shape is known without a file
    controls: ClassVar[tuple[int, int | None]]  # minimum and maximum number of control images; None: any number
    prompts_alone: ClassVar[bool]  # whether embeddings depend on prompts alone, which the cache then holds once each
    padded_text: ClassVar[int | None]  # T of every prompt where the pipeline pads it; None: as long as it is
    max_prompt_tokens: ClassVar[int]  # no prompt of up to so many tokens is cut by the stock pipeline
    stock_control_area: ClassVar[int]  # pixels of a control for the VAE in the stock pipeline
    lora_presets: ClassVar[Mapping[str, tuple[str, ...]]]  # one word of `target_modules`: endings of layer names
    comfyui_prefix: ClassVar[str]  # what ComfyUI's LoRA loader writes before a layer's name
    comfyui_names: ClassVar[Mapping[str, str]]  # of the layers that it does not find so: its own
    comfyui_alpha: ClassVar[bool]  # whether its LoRA states alpha; else B has it, which diffusers takes as well
    comfyui_reads_layout: ClassVar[bool]  # whether it loads a whole transformer in diffusers' layout
    negative_prompt: ClassVar[str]  # of the stock pipeline or the model cards, where guidance leads away from one
    comfyui_controls: ClassVar[str | None]  # how controls get the size of the image there; None: it takes no controls
    block_causal: ClassVar[bool]  # attention goes from block to block: text, control, ..., text, target
    keeps_alpha: ClassVar[bool]  # images are RGBA, where others have their transparency laid on `data.background`
    path: str
    revision: str | None
    background: str  # on which the text encoder sees transparency that is kept

    def __init__(self, path: str, *, revision: str | None = None, synthetic: bool = False) -> None:
        """`synthetic`: only shapes are read of the base, of a stock base nothing; weights are noise."""

    # What configuration files of the base say. No weight is read.

    def pixels_per_token(self) -> int:
        """Side in pixels of one image token."""

    def size_multiple(self) -> int:
        """Sides of what is made are multiples of so many pixels."""

    def training_notice(self) -> str | None:
        """What a user should know who trains this base, in one line; None where there is nothing to say."""

    def flow_shift(self, steps: int | None = None) -> dict[str, float]:
        """The constants of `resolution_shift` for this base: those with which its pipeline samples in so many steps.

        Raises:
            UserError: `steps` are given, and the shift does not depend on them.
        """

    def embedded_guidance(self) -> EmbeddedGuidance | None:
        """The guidance of a transformer that takes one; None where there is no such input."""

    def transformer_skeleton(self) -> Any:
        """The transformer on the meta device, patched: to check names and shapes, or to count memory and FLOPs on."""

    def token_widths(self) -> tuple[int, int]:
        """P of an image token and D of a text token."""

    def pooled_width(self) -> int:
        """W of a prompt's pooled embedding; 0: the transformer takes none."""

    def entry_bytes(self, *, image_tokens: int, text_tokens: int, mask_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of a cached sample on disk. `text_tokens` are those of all its prompts."""

    def encoder_fingerprint(self, memo: Path | None = None) -> str:
        """32 hex characters that change with any byte of what `encode` uses; `memo` is a file of known digests."""

    # Records before they are encoded.

    def record_problem(self, *, controls: int, prompt: str) -> str | None:
        """Why this family cannot take a record with so many controls and this prompt; None where it can."""

    def sizes_problem(self, sizes: ControlSizes) -> str | None:
        """Why the encoders cannot take controls of these sizes; None where they can."""

    def over_long(self, prompts: Iterable[str]) -> dict[str, tuple[int, str]]:
        """Of `prompts` those over `max_prompt_tokens`: how many tokens, and the longest beginning that fits."""

    def control_areas(self, area: AreaRule, text_area: int | None) -> dict[str, AreaRule]:
        """The rules for the areas of controls by name; part of the cache key and of the LoRA's metadata.

        Raises:
            UserError: the family does not have a size that is given.
        """

    def control_sizes(
        self,
        target: Size,
        controls: Sequence[Size],
        rules: Mapping[str, AreaRule] | None = None,
        aligned: Sequence[bool] = (),
    ) -> ControlSizes:
        """The sizes of controls whose files have the sizes `controls`, beside a target trained or made at `target`.

        `rules` are those of `control_areas`, by default the stock pipeline's. The VAE gets a control that is `aligned`
        at the target's size; without `aligned` none is.
        """

    def grids(self, target: Size, sizes: ControlSizes) -> tuple[Grid, ...]:
        """Token grids of a target of this size and of its controls, target first."""

    def vae_skeleton(self) -> Any:
        """The VAE on the meta device, from its configuration."""

    def text_encoder_skeletons(self) -> Sequence[Any]:
        """The text encoders on the meta device, from their configurations."""

    def load_preprocessors(self) -> Any:
        """The stock pipeline with tokenizer and image processor, without any weight."""

    def text_tokens(self, preprocessors: Any, *, prompt: str, sizes: ControlSizes) -> int:
        """T of `encode_prompt`, exactly."""

    def text_problem(self, grids: Sequence[Grid], text_tokens: int) -> str | None:
        """Why the transformer has no positions for so much text beside images of these grids; None where it has."""

    def previews(
        self,
        preprocessors: Any,
        *,
        target: Image.Image,
        target_size: Size,
        controls: Sequence[Image.Image],
        sizes: ControlSizes,
    ) -> dict[str, Image.Image]:
        """What VAE and text encoder are given of a record, as images with a heading each, target first."""

    # Encoding.

    def load_encoders(self, *, dtype: torch.dtype, device: torch.device | str, text: bool = True) -> Any:
        """The stock pipeline with frozen VAE and, with `text`, text encoder, without a transformer."""

    def encode_prompt(
        self, encoders: Any, *, controls: Sequence[Image.Image], prompt: str, sizes: ControlSizes
    ) -> TextEmbeds:
        """`(T, D)` on the CPU: bit for bit what the stock pipeline hands to its transformer, unpadded."""

    def encode(
        self,
        encoders: Any,
        *,
        name: str,
        target: Image.Image,
        target_size: Size,
        controls: Sequence[Image.Image],
        prompt: str,
        sizes: ControlSizes,
        mask: Image.Image | None = None,
        text: TextEmbeds | None = None,
    ) -> Sample:
        """A sample from RGB images of any size (RGBA too, with `keeps_alpha`), on the CPU and in the encoders' dtype.

        The target is resized to `target_size` pixels, the controls to `sizes`. `mask` ("L") is as large as the target.
        Latents are those of the stock pipeline, bit for bit. `text` is what `encode_prompt` gives, where that is known.

        Raises:
            UserError: `record_problem` finds one.
        """

    # The transformer.

    def load_transformer(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        trained: Path | None = None,
        quantize: Method | None = None,
    ) -> Any:
        """The stock transformer, or that in the folder `trained`, patched to take samples of different sizes."""

    def transformer_folder(self) -> Path | None:
        """Where the weights of the base's transformer are; None: there are none to read."""

    def patch_state(self, transformer: Any, /) -> PatchState:
        """How much of the patch a transformer carries: adapters or an attention backend must have removed nothing."""

    def untrained_modules(self, transformer: nn.Module) -> tuple[str, ...]:
        """Modules whose output reaches no loss: they get no adapter and stay frozen."""

    def predict_velocity(
        self,
        transformer: nn.Module,
        batch: Batch,
        noisy_latents: Tensor,
        sigmas: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity at every image token, in the layout of the batch: one keyword call of the stock forward.

        `noisy_latents` is as `batch.latents`, `sigmas` `(B,)` in [0, 1], `guidance` `(B,)` where there is an
        `embedded_guidance`. Any wrapper that passes keyword arguments on may stand for the transformer.
        """

    def comfyui_markers(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors by which ComfyUI recognises a transformer of this configuration, beside its weights."""

    # Sampling.

    def default_size(self, control: Size | None) -> Size:
        """The size that the stock pipeline makes where none is given, at the aspect of the last control."""

    def load_sampling_pipeline(
        self, *, transformer: nn.Module | None, dtype: torch.dtype, device: torch.device | str
    ) -> Any:
        """The stock pipeline around `transformer`, without a text encoder. `dtype` and `device` are the VAE's."""

    def control_latents(self, pipeline: Any, controls: Sequence[Image.Image], sizes: ControlSizes) -> list[Tensor]:
        """`(S, P)` of each control at its size, as `encode` makes them; `pipeline` has at least a VAE."""

    def noise(self, grid: Grid, *, seed: int, dtype: torch.dtype) -> Tensor:
        """`(S, P)` from which the stock pipeline denoises an image on `grid`, with a CPU generator of this seed.

        So a seed means the same image on every device. `dtype` is the transformer's.
        """

    def schedule(self, pipeline: Any, steps: int) -> tuple[Any, Sequence[float] | None, dict[str, float]]:
        """A scheduler of the pipeline's kind, its sigmas before the shift, and the constants of their shift."""

    def guide(self, positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
        """The velocity `(S, P)` that leads away from that of the negative prompt, as the stock pipeline computes it."""

    def decode_latents(self, pipeline: Any, latents: Tensor, grid: Grid) -> Image.Image:
        """The image of normalised, packed latents `(S, P)` on `grid`: what the stock pipeline would show."""
