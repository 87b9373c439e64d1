"""What families share that are a stock pipeline of diffusers in a folder: its files, its parts, weights of noise.

Promise: what is loaded is what the stock pipeline loads, and nothing else is read. A family adds its classes, its sizes
and how its pipeline is called.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mixres.errors import UserError
from mixres.geometry import Grid, Size, token_grid
from mixres.models import hub
from mixres.models.family import AreaRule, ControlSizes, EmbeddedGuidance, Family
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
    transformer_class: ClassVar[Any]
    quantize_exclusions: ClassVar[tuple[str, ...]]  # modules with linear layers that are in no repeated block
    # Configuration files of the stock bases by name, where they differ from the defaults of diffusers' classes.
    stock_configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, path: str, *, revision: str | None = None, synthetic: bool = False) -> None:
        self.path, self.revision, self._synthetic = path, revision, synthetic
        self._config = functools.cache(self._read_config)  # asked for each record

    # What a family adds.

    def patch(self, transformer: Any) -> Any:
        """The transformer, patched in place."""
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

    def _read_config(self, name: str) -> Mapping[str, Any]:
        if self._synthetic and self.path in self.stock_bases and not Path(self.path).is_dir():
            return dict(self.stock_configs.get(name, {}))
        return hub.pipeline_json(self.path, name, revision=self.revision)

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

    def grids(self, target: Size, sizes: ControlSizes) -> tuple[Grid, ...]:
        """See `Family`."""
        token = self.pixels_per_token()
        return tuple(token_grid(size, token) for size in (target, *sizes.vae))

    # Parts.

    def load_encoders(self, *, dtype: torch.dtype, device: torch.device | str) -> Any:
        """See `Family`."""
        folder = hub.pipeline_folder(self.path, (*self.components, "scheduler"), revision=self.revision)
        with reading(folder):
            own = self.own_parts(folder, self.components)
            absent = dict.fromkeys(("transformer", *own))
            pipeline = self.pipeline_class.from_pretrained(folder, **absent, dtype=dtype, use_safetensors=True)
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
        folder = trained or hub.pipeline_folder(self.path, ("transformer",), revision=self.revision) / "transformer"
        quantization = None
        if quantize:
            quantization = quantization_config(quantize, self.quantize_exclusions, dtype=dtype, device=device)
        with reading(folder):
            transformer = self.transformer_class.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, quantization_config=quantization
            )
        return self.patch(transformer.to(device))

    def load_sampling_pipeline(
        self, *, transformer: nn.Module | None, dtype: torch.dtype, device: torch.device | str
    ) -> Any:
        """See `Family`."""
        folder = hub.pipeline_folder(self.path, ("vae", "scheduler"), revision=self.revision)
        absent = {name: None for name in self.components if name != "vae"}
        with reading(folder):
            pipeline = self.pipeline_class.from_pretrained(
                folder, transformer=transformer, **absent, dtype=dtype, use_safetensors=True
            )
        pipeline.vae.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)


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


@contextmanager
def evaluating(transformer: nn.Module) -> Iterator[None]:
    """Within it the transformer is in evaluation mode; the mode is put back."""
    was_training = transformer.training
    transformer.eval()
    try:
        yield
    finally:
        transformer.train(was_training)


@contextmanager
def attributes_set(owner: Any, **values: Any) -> Iterator[None]:
    """Within it a stock module or object has these values."""
    before = dict(vars(owner))
    try:
        vars(owner).update(values)
        yield
    finally:
        for name in values:
            if name in before:
                vars(owner)[name] = before[name]
            else:
                del vars(owner)[name]


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Names the base that could not be read, in one line, where a library fails on its files."""
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{hub.KEY}: {folder} cannot be loaded: {reason}; download it again") from error


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
    return skeleton.eval()
