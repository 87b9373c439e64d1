"""What families share that are a stock pipeline of diffusers in a folder: its files, its parts, weights of noise.

Promise: what is loaded is what the stock pipeline loads, and nothing else is read. A family adds its classes, its sizes
and how its pipeline is called.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from mixres.batch import Sample, TextEmbeds
from mixres.errors import UserError
from mixres.geometry import PATCH, Grid, Size, pack_latents, token_grid
from mixres.models import hub
from mixres.models.edit_mask import mask_on_grid
from mixres.models.family import AreaRule, ControlSizes, EmbeddedGuidance, Family
from mixres.models.pretrained import load_pretrained, reading, with_buffers
from mixres.models.prompt_length import over_long
from mixres.models.quantize import Method, check_method, is_torchao, quantization_config, quantize_blocks


class StockFamily(Family):
    """See `mixres.models.family.Family` for what each method gives."""

    controls_problem: ClassVar[str]  # where a record has {} controls, too few or too many
    comfyui_names: ClassVar[Mapping[str, str]] = {}
    comfyui_alpha: ClassVar[bool] = True
    comfyui_reads_layout: ClassVar[bool] = True
    prompts_alone: ClassVar[bool] = False
    padded_text: ClassVar[int | None] = None
    components: ClassVar[tuple[str, ...]]  # those that encode
    tokenizer_folder: ClassVar[str] = "tokenizer"  # of the tokenizer that `max_prompt_tokens` counts
    transformer_class: ClassVar[Any]
    vae_class: ClassVar[Any]
    init_parts: ClassVar[tuple[str, ...]] = ()  # components, `own_parts` all, without which the pipeline is not made
    keeps_alpha: ClassVar[bool] = False
    block_causal: ClassVar[bool] = False
    noise_patch: ClassVar[int] = PATCH  # along a side of a token, of what the pipeline draws: latent pixels, or tokens
    quantize_exclusions: ClassVar[tuple[str, ...]]  # modules with linear layers that are in no repeated block
    # Configuration files of the stock bases by name, where they differ from the defaults of diffusers' classes.
    stock_configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, path: str, *, revision: str | None = None, synthetic: bool = False) -> None:
        self.path, self.revision, self._synthetic = path, revision, synthetic
        self.background = "white"  # as in the stock pipelines
        self._configs: dict[str, Mapping[str, Any]] = {}  # that were read: they are asked for with each record

    # What a family adds.

    def patch(self, transformer: Any, /) -> Any:
        """The transformer, patched in place."""
        raise NotImplementedError

    def encode_image(self, pipeline: Any, image: Image.Image, size: Size) -> Tensor:
        """`(S, P)` normalised, packed latents of the image at `size`, on the CPU; no noise of the VAE's is added."""
        raise NotImplementedError

    def encoding_environment(self) -> str:
        """What beside the files of the base changes the bytes of an encoded sample."""
        return ""

    def pooled_width(self) -> int:
        """See `Family`: none, unless a family has one."""
        return 0

    def own_parts(self, folder: Path, names: Sequence[str]) -> dict[str, Any]:
        """Those of the components `names` that `from_pretrained` of the pipeline cannot load."""
        return {}

    # Configuration files.

    def _config(self, name: str) -> Mapping[str, Any]:
        if name not in self._configs:
            stock = self._synthetic and self.path in self.stock_bases and not Path(self.path).is_dir()
            own = self.stock_configs.get(name, {})
            self._configs[name] = dict(own) if stock else hub.pipeline_json(self.path, name, revision=self.revision)
        return self._configs[name]

    def encoder_fingerprint(self, memo: Path | None = None) -> str:
        """See `Family`."""
        salt = self.encoding_environment()
        return hub.fingerprint(self.path, self.components, revision=self.revision, memo=memo, salt=salt)

    def training_notice(self) -> str | None:
        """See `Family`."""
        return None

    def flow_shift(self, steps: int | None = None) -> dict[str, float]:
        """See `Family`: what most pipelines hand to `calculate_shift`, the scheduler's constants or its defaults."""
        if steps is not None:
            raise UserError(f"flow.shift_steps: the shift of {self.path} does not depend on steps: leave it out")
        config = self._config("scheduler/scheduler_config.json")
        return {
            "base_seq_len": config.get("base_image_seq_len", 256),
            "max_seq_len": config.get("max_image_seq_len", 4096),
            "base_shift": config.get("base_shift", 0.5),
            "max_shift": config.get("max_shift", 1.15),
        }

    def embedded_guidance(self) -> EmbeddedGuidance | None:
        """See `Family`: none, for most transformers."""
        return None

    def record_problem(self, *, controls: int, prompt: str) -> str | None:
        """See `Family`."""
        low, high = self.controls
        fits = low <= controls and (high is None or controls <= high)
        return None if fits else self.controls_problem.format(controls)

    def over_long(self, prompts: Iterable[str]) -> dict[str, tuple[int, str]]:
        """See `Family`."""
        limit, folder = self.max_prompt_tokens, self.tokenizer_folder
        return over_long(prompts, self.path, limit=limit, revision=self.revision, tokenizer=folder)

    def size_multiple(self) -> int:
        """See `Family`: those of one token, for most pipelines."""
        return self.pixels_per_token()

    def sizes_problem(self, sizes: ControlSizes) -> str | None:
        """See `Family`: most encoders take any size."""
        return None

    def grids(self, target: Size, sizes: ControlSizes) -> tuple[Grid, ...]:
        """See `Family`."""
        token = self.pixels_per_token()
        return tuple(token_grid(size, token) for size in (target, *sizes.vae))

    # Encoding.

    def vae_controls(self, pipeline: Any, controls: Sequence[Image.Image], sizes: ControlSizes) -> list[Image.Image]:
        """The controls as the VAE is handed them, which resizes each to its size."""
        return list(controls)

    @torch.no_grad()
    def control_latents(self, pipeline: Any, controls: Sequence[Image.Image], sizes: ControlSizes) -> list[Tensor]:
        """See `Family`."""
        images = zip(self.vae_controls(pipeline, controls, sizes), sizes.vae, strict=True)
        return [self.encode_image(pipeline, image, size) for image, size in images]

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
        """See `Family`. The mask becomes the foreground fraction of each target token, the mean over its area."""
        if problem := self.record_problem(controls=len(controls), prompt=prompt):
            raise UserError(f"{name}: {problem}")
        text = text or self.encode_prompt(encoders, controls=controls, prompt=prompt, sizes=sizes)
        grids = self.grids(target_size, sizes)
        return Sample(
            name=name,
            target_latents=self.encode_image(encoders, target, target_size),
            control_latents=tuple(self.control_latents(encoders, controls, sizes)),
            prompt_embeds=text.tokens,
            img_shapes=grids,
            edit_mask=None if mask is None else mask_on_grid(mask, grids[0]),
            pooled_embeds=text.pooled,
            text_before=text.before,
        )

    # The transformer.

    def untrained_modules(self, transformer: nn.Module) -> tuple[str, ...]:
        """See `Family`. Most last blocks have layers that serve text and images alike."""
        return ()

    def comfyui_markers(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `Family`. The layers' names are enough, for most transformers."""
        return {}

    # Parts.

    def vae_skeleton(self) -> Any:
        """See `Family`."""
        with torch.device("meta"):
            return self.vae_class.from_config(self._config("vae/config.json"))

    def text_encoder_skeletons(self) -> Sequence[Any]:
        """See `Family`."""
        found, kinds = [], self._config("model_index.json")
        for name in self.components:
            if name.startswith("text_encoder"):
                kind = getattr(transformers, kinds[name][1])
                config = kind.config_class.from_dict(dict(self._config(f"{name}/config.json")))
                with torch.device("meta"):
                    found.append(kind(config))
        return found

    def load_encoders(self, *, dtype: torch.dtype, device: torch.device | str, text: bool = True) -> Any:
        """See `Family`."""
        folder = hub.pipeline_folder(self.path, (*self.components, "scheduler"), revision=self.revision)
        with reading(folder):
            own = self.own_parts(folder, self.components)
            texts = () if text else (name for name in self.components if name.startswith("text_encoder"))
            given = dict.fromkeys(("transformer", *own, *texts)) | {name: own[name] for name in self.init_parts}
            pipeline = self.pipeline_class.from_pretrained(folder, **given, dtype=dtype, use_safetensors=True)
            # Not through `from_pretrained`, which warns at every load that a class is not the annotated one.
            pipeline.register_modules(**own)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        return pipeline.to(device)

    def transformer_skeleton(self) -> Any:
        """See `Family`."""
        with torch.device("meta"):
            transformer = self.transformer_class.from_config(self._config("transformer/config.json"))
        return self.patch(transformer)

    def load_transformer(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        trained: Path | None = None,
        quantize: Method | None = None,
    ) -> Any:
        """See `Family`."""
        if self._synthetic:
            return _filled_with_noise(self.transformer_skeleton(), dtype, device, quantize)
        quantization = None
        if quantize:
            quantization = quantization_config(quantize, self.quantize_exclusions, dtype=dtype, device=device)
        folder = trained or self.transformer_folder()
        kind = self.transformer_class
        return self.patch(load_pretrained(kind, folder, dtype=dtype, device=device, quantization=quantization))

    def transformer_folder(self) -> Path:
        """See `Family`."""
        return hub.pipeline_folder(self.path, ("transformer",), revision=self.revision) / "transformer"

    def load_sampling_pipeline(
        self, *, transformer: nn.Module | None, dtype: torch.dtype, device: torch.device | str
    ) -> Any:
        """See `Family`."""
        folder = hub.pipeline_folder(self.path, ("vae", "scheduler", *self.init_parts), revision=self.revision)
        with reading(folder):
            given: dict[str, Any] = {name: None for name in self.components if name != "vae"}
            given |= {"transformer": None, **self.own_parts(folder, self.init_parts)}
            pipeline = self.pipeline_class.from_pretrained(folder, **given, dtype=dtype, use_safetensors=True)
        pipeline.vae.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device).register_modules(transformer=transformer)  # which stays where it is
        return pipeline

    # Sampling.

    def noise(self, grid: Grid, *, seed: int, dtype: torch.dtype) -> Tensor:
        """See `Family`. What most pipelines draw are latents; the order of channels and pixels is theirs."""
        side = self.noise_patch
        shape = (self.token_widths()[0] // side**2, 1, grid.rows * side, grid.columns * side)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        return latents.flatten(1).T if side == 1 else pack_latents(latents)

    def schedule(self, pipeline: Any, steps: int) -> tuple[Any, Sequence[float] | None, dict[str, float]]:
        """See `Family`."""
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        own_sigmas = scheduler.config.get("use_flow_sigmas", False)
        return scheduler, None if own_sigmas else np.linspace(1.0, 1 / steps, steps).tolist(), self.flow_shift()

    def guide(self, positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
        """See `Family`. Source: classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598)."""
        return negative + guidance * (positive - negative)


def no_control_areas(label: str, area: AreaRule, text_area: int | None, *, stock: int) -> dict[str, AreaRule]:
    """`Family.control_areas` of a family that takes no controls; `stock` is the default of `area`.

    Raises:
        UserError: a size of controls is given.
    """
    given = {"area": area != stock, "text_area": text_area is not None}
    problems = [
        f"data.resize.control.{name}: {label} takes no control images: leave it out"
        for name, is_given in given.items()
        if is_given
    ]
    if problems:
        raise UserError(problems)
    return {}


@torch.no_grad()
def _filled_with_noise(skeleton: Any, dtype: torch.dtype, device: torch.device | str, quantize: Method | None) -> Any:
    """The skeleton with weights on `device`. Those of one shape are the same: 20 B numbers are drawn for minutes.

    Raises:
        UserError: it cannot be quantised so.
    """
    if quantize:
        check_method(quantize, torch.device(device))
        if not is_torchao(quantize):
            raise UserError(f"model.quantize: {quantize} needs weights, --synthetic has none: int8, fp8 or null")
    nn.Module.to(skeleton, dtype)  # not diffusers' own, which warns about casts of pretrained weights
    generator = torch.Generator(device).manual_seed(0)
    drawn: dict[torch.Size, Tensor] = {}

    def fill(part: nn.Module) -> None:
        for module in part.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.is_meta:
                    continue
                weights = torch.empty_like(parameter, device=device)
                if not isinstance(module, nn.Linear) or name == "bias":
                    weights.fill_(0.0 if name == "bias" else 1.0)
                elif (shape := weights.shape) in drawn:
                    weights.copy_(drawn[shape])
                else:
                    drawn[shape] = weights.normal_(std=module.in_features**-0.5, generator=generator)
                setattr(module, name, nn.Parameter(weights))

    if quantize:
        quantize_blocks(skeleton, quantize, dtype=dtype, before=fill)
    fill(skeleton)
    return with_buffers(skeleton, device).eval()
