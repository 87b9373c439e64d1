"""Every key of a configuration: type, range, default, meaning, and which keys do not fit each other.

Promise: a `Config` that exists is valid and never changes.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

COLOUR = r"^(white|gray|black|#[0-9A-Fa-f]{6})$"
TrackerName = Literal["none", "wandb", "tensorboard", "trackio"]
Steps = Annotated[int, Field(ge=0, le=10**9)]
Area = Annotated[int, Field(ge=1024, le=2**28)]


def _not_blank(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise PydanticCustomError("blank", "Input should be text that is not empty")
    return text


def as_tuple(value: Any) -> Any:
    """A text or a list as the tuple that a field holds; anything else unchanged, for the field to refuse."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Text = Annotated[str, AfterValidator(_not_blank)]
Sigma = Annotated[float, Field(gt=0, le=1)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(as_tuple), Field(min_length=1)]


# LoRA and DoRA have weights that diffusers reads; the others are files of LyCORIS.
Adapter = Literal["lora", "dora", "lokr", "loha"]
LYCORIS = ("lokr", "loha")


def _no_secret(text: str) -> str:
    scheme, is_url, rest = text.partition("://")
    host = rest.partition("/")[0]
    web = scheme.lower().endswith(("http", "https"))  # such as filecache::https
    if is_url and (re.search(r"@|:(?!\d+$)", host) or re.search(r"\?.*=", rest) or (web and re.search("[?@]", rest))):
        fix = "config.yaml keeps them; give credentials in the environment"
        raise PydanticCustomError("secret", f"Input should be a URL without user, password and query string: {fix}")
    return text


PathOrUrl = Annotated[Text, AfterValidator(_no_secret)]
Sources = Annotated[tuple[PathOrUrl, ...], BeforeValidator(as_tuple), Field(min_length=1)]
Role = Annotated[str, Field(pattern=r"^(target|control|control_[1-9]\d{0,3}|mask|prompt|align_control)$")]


class Section(BaseModel):
    """What all sections share: no unknown keys, no coercion, no NaN, no change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class LoraConfig(Section):
    r: int = Field(16, ge=1, le=4096, description="Rank of the adapters.")
    lora_alpha: float = Field(16.0, gt=0, le=65536, description="lora_alpha / r multiplies the adapters' output.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout; above 0 only the same topology resumes exactly.")
    target_modules: Texts = Field(
        ("attention",), description="Layers with adapters: attention, attention+mlp, all, or name endings that match."
    )
    use_dora: bool = Field(False, description="The same as model.adapter: dora.")
    factor: Literal[-1] | Annotated[int, Field(ge=2, le=4096)] = Field(
        8,
        description="lokr: each side of a weight is split into this, or nearly, times the rest; -1: halfway.",
    )
    decompose_both: bool = Field(False, description="lokr: give the small factor of each weight a low rank too.")
    pretrained_weight: Text | None = Field(None, description="A LoRA file, or its folder; training continues from it.")


class ModelConfig(Section):
    pretrained_model_name_or_path: Text = Field(description="Hub name or local folder of the base pipeline.")
    revision: Text | None = Field(None, description="Hub branch, tag or commit; null takes the default branch.")
    family: Text | None = Field(None, description="Model family; null reads it from the base's model_index.json.")
    dtype: Literal["bfloat16", "float32", "float64"] = Field(
        "bfloat16", description="Precision of the base weights; adapters stay float32. float64 is for tests."
    )
    quantize: Literal["int8", "fp8", "nf4", "bnb_int8"] | None = Field(
        None, description="Base weights in 8 or 4 bits under a LoRA: torchao's int8, fp8, bitsandbytes' nf4, bnb_int8."
    )
    guidance: float | None = Field(
        None, ge=0, le=100, description="Guidance in training where the transformer takes it; null: the family's, 1.0."
    )
    adapter: Adapter = Field(
        "lora", description="lora; dora learns the lengths of rows too; lokr, loha: Kronecker and Hadamard products."
    )
    lora: LoraConfig | None = Field(LoraConfig(), description="The adapters to train; null trains all weights.")

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, given: Any) -> Any:
        """`adapter: dora` and `lora.use_dora: true`, the older key, mean each other where one is given alone."""
        if not isinstance(given, dict) or not isinstance(lora := given.get("lora", {}), dict):
            return given
        if given.get("adapter") == "dora" and "use_dora" not in lora:
            return {**given, "lora": {**lora, "use_dora": True}}
        if lora.get("use_dora") is True and "adapter" not in given:
            return {**given, "adapter": "dora"}
        return given

    def adapter_settings(self) -> dict[str, Any]:
        """What `models.lora` takes of the adapters, which there are."""
        assert self.lora is not None
        return self.lora.model_dump() | {"adapter": self.adapter}


class MaskWeightConfig(Section):
    foreground: float = Field(2.0, ge=0, le=1e6, description="Loss weight of tokens inside the edit mask.")
    background: float = Field(1.0, ge=0, le=1e6, description="Loss weight of tokens outside the edit mask.")


class TargetSizeConfig(Section):
    max_pixels: int = Field(1_048_576, ge=256, le=2**28, description="Larger targets are scaled down to this.")
    multiple_of: int = Field(16, ge=1, le=1024, description="Target sides are rounded to multiples of this, in pixels.")
    upscale: bool = Field(False, description="Also scale smaller targets up to max_pixels.")


class ControlSizeConfig(Section):
    area: Area | Literal["target"] = Field(1_048_576, description="Pixels of a control; target: as many as its target.")
    text_area: Area | None = Field(None, description="The same for Edit-Plus's text encoder; null: 384 x 384.")
    align: Literal["auto", "always", "never"] = Field(
        "auto", description="Controls at their target's size: those of its aspect (auto), all, or none; else by area."
    )


class ResizeConfig(Section):
    target: TargetSizeConfig = Field(TargetSizeConfig(), description="Size rule of the target images.")
    control: ControlSizeConfig = Field(ControlSizeConfig(), description="Size rule of the control images.")


class LimitsConfig(Section):
    max_source_pixels: int = Field(64_000_000, ge=256, le=2**32, description="Images with more pixels are refused.")
    max_bytes: int = Field(512 * 2**20, ge=1, le=2**40, description="Image files with more bytes are refused.")
    max_aspect: float = Field(8.0, ge=1, le=1000, description="Images whose long / short side is larger are refused.")


class DataConfig(Section):
    train: Sources = Field(
        description="Training data: a folder, a manifest, a saved data set, tar or parquet files by path, URL or glob, "
        "or a list of them."
    )
    held_out: Sources | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Samples for grids and evaluation, never trained: given as data.train, or a fraction of it."
    )
    regularization: Sources | None = Field(None, description="Samples that keep what the base knows; as data.train.")
    columns: dict[Role, Text] = Field(
        {},
        description="Columns of tar, parquet and saved sets by role, as {target: jpg}; others have their role's name.",
    )
    on_bad_item: Literal["error", "skip"] = Field("error", description="Stop at unusable records, or skip them.")
    empty_caption: Literal["error", "use_empty", "skip"] = Field("error", description="Records without a prompt.")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="Fraction of samples trained with an empty prompt.")
    long_caption: Literal["error", "truncate"] = Field(
        "error", description="Prompts of more tokens than the pipeline takes."
    )
    first_frame: bool = Field(False, description="Train on the first image of animations and of multi-page files.")
    background: str = Field("white", pattern=COLOUR, description='Under transparency: white, gray, black or "#rrggbb".')
    follow_symlinks: bool = Field(False, description="Read links that lead out of the data folder.")
    num_workers: int = Field(2, ge=0, le=256, description="Processes that load samples; 0 loads in the main process.")
    mask_weight: MaskWeightConfig = Field(MaskWeightConfig(), description="Loss weights of samples with an edit mask.")
    resize: ResizeConfig = Field(ResizeConfig(), description="Size rules; nothing is ever cropped.")
    limits: LimitsConfig = Field(LimitsConfig(), description="Limits of an image file.")


class BatchConfig(Section):
    samples_per_step: int = Field(4, ge=1, le=2**20, description="Samples of one optimizer step, over all devices.")
    max_tokens: int = Field(16384, ge=1, le=2**31, description="Maximum tokens of a microbatch, padding included.")
    layout: Literal["packed", "padded"] = Field("packed", description="All samples in one sequence, or rows padded.")


class FlowConfig(Section):
    density: Literal["logit_normal", "uniform", "mode"] = Field(
        "logit_normal", description="Distribution of the training timesteps (Esser et al. 2024, section 3.1)."
    )
    logit_mean: float = Field(0.0, ge=-100, le=100, description="Mean of the logit-normal density.")
    logit_std: float = Field(1.0, gt=0, le=100, description="Standard deviation of the logit-normal density.")
    mode_scale: float = Field(1.29, ge=-1, le=1.75, description="Scale of the mode density.")
    shift: Literal["resolution", "constant", "none"] = Field(
        "resolution", description="Timestep shift: by each target's token count as in sampling, fixed, or none."
    )
    shift_value: float = Field(3.0, gt=0, le=100, description="The shift of flow.shift: constant.")
    shift_steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Denoising steps for a resolution shift that depends on them; null: the pipeline's default.",
    )


class LossConfig(Section):
    normalization: Literal["sample", "token"] = Field("sample", description="Weigh samples equally, or target tokens.")
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = Field("none", description="Loss weight by timestep.")
    prior_loss_weight: float = Field(1.0, gt=0, le=1e6, description="Loss weight of samples of data.regularization.")


class OptimizerConfig(Section):
    class_path: str = Field(
        "torch.optim.AdamW", pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$", description="Dotted name of its class."
    )
    init_args: dict[str, Any] = Field({"lr": 1e-4}, description="Arguments of the class; lr is 1e-4 unless given here.")


Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


class SchedulerConfig(Section):
    scheduler_type: Schedule = Field("constant", description="Learning rate schedule (diffusers' names).")
    warmup_steps: Steps = Field(0, description="Steps of the warm-up; the first of them has learning rate 0.")


class OffloadConfig(Section):
    blocks: int | None = Field(
        None,
        ge=1,
        description="Blocks whose frozen matrices are on the device at once; from 2 on copied ahead. null: all.",
    )
    activations: bool = Field(False, description="Keep the inputs of recomputed blocks in host memory until backward.")


class TrainConfig(Section):
    max_train_steps: int = Field(1000, ge=1, le=10**9, description="Optimizer steps of the whole run.")
    parallel: Literal["ddp", "fsdp2"] = Field("ddp", description="All weights on each device (ddp), or split (fsdp2).")
    shard_size: int | None = Field(
        None, ge=2, description="fsdp2: so many processes in a row share the weights, groups are copies; null: all."
    )
    shard_read: Literal["mapped", "rows"] = Field(
        "mapped", description="fsdp2: each process maps the base's files, or (network disks) reads only its own rows."
    )
    cpu_offload: bool = Field(
        False, description="fsdp2: weights that stay, gradients and optimizer state in host memory; slower."
    )
    max_grad_norm: float = Field(1.0, gt=0, le=1e9, description="The gradient is scaled down to this norm.")
    max_skips: Steps = Field(5, description="Steps in a row that may be skipped where loss or gradient is not finite.")
    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] = Field(
        True, description="Recompute activations in the backward pass: of all blocks, of every n-th, or of none."
    )
    offload: OffloadConfig = Field(OffloadConfig(), description="What waits in host memory while a LoRA trains.")
    compile: bool = Field(False, description="Compile the blocks (batch.layout: padded); row lengths are rounded up.")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="Decay of a moving average of the weights, or none.")
    mixed_precision: Literal["bf16", "no"] = Field("bf16", description="Autocast of the forward pass.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of order, noise, timesteps and initial adapters.")
    deterministic: bool = Field(False, description="Only kernels that repeat their results; CUDA is slower.")
    timeout_minutes: float = Field(
        30.0, gt=0, le=10080, description="A collective between devices that takes longer ends the run, on all of them."
    )


class CacheConfig(Section):
    cache_dir: PathOrUrl = Field(
        "./cache", description="Folder of the encoded samples, or its URL (s3://, gs://, hf://); runs may share it."
    )
    shard_gb: float = Field(
        0.0,
        ge=0,
        le=100,
        description="GB at which a shard of new entries is closed, such as 1.0; 0: a file an entry, at a URL 1.0.",
    )
    local_dir: Text = Field("~/.cache/mixres", description="Folder of this machine's copies of a cache at a URL.")
    local_gb: float = Field(
        100.0, ge=0, le=10**6, description="GB of copies; those used longest ago are deleted first."
    )
    text: Literal["float8", "recompute"] | None = Field(
        None,
        description="Text embeddings: float8 stores them in 8 bits (e4m3, a scale a token), null in model.dtype; "
        "recompute stores none and runs the text encoder while training.",
    )
    text_device: Annotated[str, Field(pattern=r"^(cpu|cuda:\d{1,2})$")] | None = Field(
        None, description="Where the text encoder of recompute is: cpu, or cuda:N; null: each rank's own device."
    )


class CheckpointConfig(Section):
    every: int = Field(500, ge=1, le=10**9, description="Steps between checkpoints; the last step always saves one.")
    keep: int = Field(2, ge=2, le=10**6, description="Checkpoints to keep; at least 2, so that one is always complete.")


class SampleConfig(Section):
    every: Steps = Field(500, description="Steps between sample grids of data.held_out; 0 makes none.")
    steps: int = Field(20, ge=2, le=1000, description="Denoising steps of a sample.")
    use_ema: bool = Field(False, description="Sample with the moving average of the weights; needs train.ema_decay.")


class EvaluateConfig(Section):
    every: Steps = Field(0, description="Steps between evaluations of data.held_out, also at both ends; 0: none.")
    sigmas: Annotated[tuple[Sigma, ...], BeforeValidator(as_tuple), Field(min_length=1, max_length=100)] = Field(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        description="Sigmas at which every held-out sample is evaluated; each costs one forward pass a sample.",
    )
    use_ema: bool = Field(False, description="Evaluate the moving average of the weights; needs train.ema_decay.")


class LoggingConfig(Section):
    output_dir: Text = Field("./output", description="The run folder: config, metrics, checkpoints, samples, result.")
    report_to: TrackerName = Field("none", description="Tracker besides metrics.jsonl.")
    tracker_project_name: Text = Field("mixres", description="Project name in the tracker.")


# What a checkpoint fixes and a resumed run may still change; the shape of its adapters is not among them.
Changeable = Literal[
    "model.pretrained_model_name_or_path",
    "model.revision",
    "model.dtype",
    "model.quantize",
    "model.lora.lora_alpha",
    "optimizer.class_path",
    "train.seed",
    "batch.samples_per_step",
    "data.caption_dropout",
    "data.train",
    "data.regularization",
]


Clash = tuple[tuple[str, ...], str]  # the keys, and how to fix it


class Config(Section):
    """A whole run. Load it with `load_config`; what may be shown of it comes from `public_config`."""

    model: ModelConfig = Field(description="The base model, and what is trained of it.")
    data: DataConfig = Field(description="The data, and the limits of an image file.")
    batch: BatchConfig = Field(BatchConfig(), description="How many samples make a step and a microbatch.")
    flow: FlowConfig = Field(FlowConfig(), description="Timesteps of flow matching.")
    loss: LossConfig = Field(LossConfig(), description="How errors are summed.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimizer.")
    lr_scheduler: SchedulerConfig = Field(SchedulerConfig(), description="The learning rate over the run.")
    train: TrainConfig = Field(TrainConfig(), description="The training loop.")
    cache: CacheConfig = Field(CacheConfig(), description="Where encoded samples are stored.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="When the run is saved.")
    sample: SampleConfig = Field(SampleConfig(), description="Sample grids of held-out pairs during training.")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="Loss on held-out samples during training.")
    logging: LoggingConfig = Field(LoggingConfig(), description="Where the run writes and reports.")
    resume: Literal["auto", "required", "never"] = Field(
        "auto", description="Resume from the newest checkpoint: if there is one, or fail without one, or start anew."
    )
    resume_allow_changes: Annotated[tuple[Changeable, ...], BeforeValidator(as_tuple)] = Field(
        (), description="Keys whose values may differ from the checkpoint's; any other change is refused."
    )
    _references: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)  # as they were written, by key

    def idle_keys(self, *, masks: bool) -> list[str]:
        """Keys that are set and change nothing, each with the reason. `masks`: a training sample has an edit mask."""
        flow = self.flow
        density, shift = f"flow.density is {flow.density}", f"flow.shift is {flow.shift}"
        rules: tuple[tuple[bool, Section, str, tuple[str, ...], str], ...] = (
            (flow.density == "logit_normal", flow, "flow", ("logit_mean", "logit_std"), density),
            (flow.density == "mode", flow, "flow", ("mode_scale",), density),
            (flow.shift == "constant", flow, "flow", ("shift_value",), shift),
            (masks, self.data.mask_weight, "data.mask_weight", ("foreground", "background"), "no sample has a mask"),
        )
        return [
            f"{name}.{key} ({why})"
            for used, section, name, keys, why in rules
            for key in keys
            if not used and getattr(section, key) != type(section).model_fields[key].default
        ]

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        if clashes := [
            *self._model_clashes(),
            *self._split_clashes(),
            *self._offload_clashes(),
            *self._cache_clashes(),
            *self._run_clashes(),
        ]:
            raise PydanticCustomError("clash", "{clashes}", {"clashes": clashes})
        return self

    def _model_clashes(self) -> Iterator[Clash]:
        """The keys of each rule that is broken, and how to fix it."""
        model, train, lora = self.model, self.train, self.model.lora
        if model.dtype == "float64" and train.mixed_precision != "no":
            yield ("model.dtype", "train.mixed_precision"), "float64 needs train.mixed_precision: no"
        if model.quantize and lora is None:
            yield ("model.quantize", "model.lora"), "quantised weights cannot be trained: train a LoRA, or set null"
        if model.quantize and model.dtype == "float64":
            yield ("model.quantize", "model.dtype"), "quantised weights compute in bfloat16 or float32: choose one"
        if train.compile and model.quantize:
            yield ("train.compile", "model.quantize"), "quantised layers cannot be compiled: set one to its default"
        if train.compile and lora and lora.use_dora:
            yield ("train.compile", "model.lora.use_dora"), "DoRA layers cannot be compiled: set one to false"
        if model.adapter != "lora" and lora is None:
            yield ("model.adapter", "model.lora"), "without model.lora there are no adapters: leave one of the two out"
        if model.adapter in LYCORIS and lora:
            yield from self._lycoris_clashes(model.adapter, lora)
        elif lora and lora.use_dora != (model.adapter == "dora"):
            yield ("model.adapter", "model.lora.use_dora"), "they are two names of one setting: leave one of them out"
        if train.compile and self.batch.layout == "packed":
            yield ("train.compile", "batch.layout"), "each packed batch would be compiled anew: use padded"

    def _lycoris_clashes(self, kind: str, lora: LoraConfig) -> Iterator[Clash]:
        key, model = "model.adapter", self.model
        if lora.use_dora:
            yield (key, "model.lora.use_dora"), f"{kind} has no lengths of rows: set false, or model.adapter: dora"
        if lora.lora_dropout:
            yield (key, "model.lora.lora_dropout"), f"{kind} has no dropout: set 0"
        if model.quantize in ("nf4", "bnb_int8"):
            yield (key, "model.quantize"), f"{kind} needs weights of their own shape: use int8, fp8 or null"
        if self.train.compile:
            yield (key, "train.compile"), f"{kind} layers cannot be compiled: set false"

    def _split_clashes(self) -> Iterator[Clash]:
        train, split = self.train, self.train.parallel == "fsdp2"
        if self.model.quantize and split:
            yield ("model.quantize", "train.parallel"), "quantised weights cannot be split: use ddp, or set null"
        if train.compile and split:
            yield ("train.compile", "train.parallel"), "compiled blocks cannot be split: use ddp, or set false"
        for key, idle in (("shard_size", None), ("shard_read", "mapped"), ("cpu_offload", False)):
            if getattr(train, key) != idle and not split:
                yield (f"train.{key}", "train.parallel"), "only fsdp2 splits weights: use it, or leave the key out"

    def _offload_clashes(self) -> Iterator[Clash]:
        model, train = self.model, self.train
        both = {
            "train.gradient_checkpointing": "offloading recomputes all blocks: set true",
            "train.compile": "compiled blocks cannot be offloaded: set one to its default",
            "train.parallel": "split blocks cannot be offloaded: use ddp, or offload none",
        }
        rules = {
            "activations": both,
            "blocks": both
            | {
                "model.lora": "only what is frozen is swapped: train a LoRA, or set null",
                "model.quantize": "cannot be swapped: use int8, fp8 or null",
            },
        }
        broken = {
            "train.gradient_checkpointing": train.gradient_checkpointing != 1,
            "train.compile": train.compile,
            "train.parallel": train.parallel == "fsdp2",
            "model.lora": model.lora is None,
            "model.quantize": model.quantize in ("nf4", "bnb_int8"),
        }
        for name, fixes in rules.items():
            if getattr(train.offload, name):
                yield from (((f"train.offload.{name}", key), fix) for key, fix in fixes.items() if broken[key])

    def _cache_clashes(self) -> Iterator[Clash]:
        if self.cache.text_device and self.cache.text != "recompute":
            yield ("cache.text_device", "cache.text"), "only recompute runs the text encoder while training: set null"

    def _run_clashes(self) -> Iterator[Clash]:
        lr, warmup = self.optimizer.init_args.get("lr", 0), self.lr_scheduler.warmup_steps
        if isinstance(lr, bool) or not isinstance(lr, int | float) or lr < 0:
            yield ("optimizer.init_args.lr",), "allowed: a number >= 0"
        if warmup > self.train.max_train_steps:
            keys = ("lr_scheduler.warmup_steps", "train.max_train_steps")
            yield keys, "the warm-up must not be longer than the run: lower it"
        if warmup and self.lr_scheduler.scheduler_type == "constant":
            keys = ("lr_scheduler.scheduler_type", "lr_scheduler.warmup_steps")
            yield keys, "constant has no warm-up: use constant_with_warmup"
        if self.flow.shift_steps and self.flow.shift != "resolution":
            yield ("flow.shift_steps", "flow.shift"), "only the resolution shift depends on steps: set null"
        for section in ("sample", "evaluate"):
            if getattr(self, section).use_ema and self.train.ema_decay is None:
                yield (f"{section}.use_ema", "train.ema_decay"), "set a decay, such as train.ema_decay: 0.999"
        if self.loss.prior_loss_weight != 1 and self.data.regularization is None:
            yield ("loss.prior_loss_weight", "data.regularization"), "there are no samples to weight: name some"
        if len(set(self.evaluate.sigmas)) < len(self.evaluate.sigmas):
            yield ("evaluate.sigmas",), "allowed: each value once"
        if self.data.mask_weight.foreground == self.data.mask_weight.background == 0:
            yield ("data.mask_weight.foreground", "data.mask_weight.background"), "one of them must be above 0"
