"""The sections of a configuration: every key with its type, range, default and meaning.

Promise: a section that exists is valid by itself and never changes; what keys may not be together, `config_rules` says.
Cost: none beyond pydantic's.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, StringConstraints

from mixres.config.source import KeyPath

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MEBIBYTE = 2**20

COLOUR = r"^(white|gray|black|#[0-9A-Fa-f]{6})$"
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]


def as_tuple(value: Any) -> Any:
    """A text or a list as the tuple that a field holds; anything else as it is, for the field to refuse."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[Text, ...], BeforeValidator(as_tuple), Field(min_length=1)]


class Section(BaseModel):
    """What all sections share: no unknown keys, no coercion, no NaN, no change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class LoraConfig(Section):
    r: int = Field(16, ge=1, le=4096, description="Rank of the adapters.")
    lora_alpha: float = Field(16.0, gt=0, le=65536, description="Scale: the adapters' output counts lora_alpha / r.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout before the adapters; above 0 a resume is exact on the same topology only."
    )
    target_modules: Texts = Field(
        ATTENTION,
        description="Layers that get adapters: attention, attention+mlp, all, or name endings that each match a layer.",
    )
    use_dora: bool = Field(False, description="DoRA: learn the length of each output's weights besides (Liu 2024).")
    pretrained_weight: Text | None = Field(
        None, description="A LoRA file, or the folder of one, that training goes on from."
    )


class ModelConfig(Section):
    pretrained_model_name_or_path: Text = Field(description="Hub name or local folder of the base pipeline.")
    revision: Text | None = Field(None, description="Hub branch, tag or commit; null takes the default branch.")
    family: Text | None = Field(None, description="Model family; null reads it from the base's model_index.json.")
    dtype: Literal["bfloat16", "float32", "float64"] = Field(
        "bfloat16", description="Precision of the base weights; adapters stay float32 (float64 is for tests)."
    )
    quantize: Literal["int8", "fp8", "nf4", "bnb_int8"] | None = Field(
        None,
        description="Base weights in 8 or 4 bits under adapters: int8, fp8 by torchao, nf4, bnb_int8 by bitsandbytes.",
    )
    lora: LoraConfig | None = Field(LoraConfig(), description="The adapters to train; null trains all weights.")


class MaskWeightConfig(Section):
    foreground: float = Field(2.0, ge=0, le=1e6, description="Loss weight of tokens inside the edit mask.")
    background: float = Field(1.0, ge=0, le=1e6, description="Loss weight of tokens outside the edit mask.")


class TargetSizeConfig(Section):
    max_pixels: int = Field(1_048_576, ge=256, le=2**28, description="Larger targets are scaled down to this.")
    multiple_of: int = Field(16, ge=1, le=1024, description="Target sides are rounded to multiples of this, in pixels.")
    upscale: bool = Field(False, description="Also scale smaller targets up to max_pixels.")


class ControlSizeConfig(Section):
    area: Annotated[int, Field(ge=1024, le=2**28)] | Literal["target"] = Field(
        1_048_576,
        description="Pixels of a control in caching, training and sampling; target: as many as its target has.",
    )
    text_area: int | None = Field(
        None,
        ge=1024,
        le=2**28,
        description="Pixels of a control for Edit-Plus's text encoder; null takes the stock 384 x 384.",
    )


class ResizeConfig(Section):
    target: TargetSizeConfig = Field(TargetSizeConfig(), description="Size rule of the images to be learnt.")
    control: ControlSizeConfig = Field(ControlSizeConfig(), description="Size rule of the images to be edited.")


class LimitsConfig(Section):
    max_source_pixels: int = Field(64_000_000, ge=256, le=2**32, description="Images with more pixels are refused.")
    max_bytes: int = Field(512 * MEBIBYTE, ge=1, le=2**40, description="Image files with more bytes are refused.")
    max_aspect: float = Field(8.0, ge=1, le=1000, description="Images of a larger long / short side are refused.")


class DataConfig(Section):
    train: Texts = Field(description="Training data: a folder, a manifest, a saved data set, or a list of them.")
    held_out: Texts | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Examples that are never trained, for samples: given as data.train, or a share of it.",
        json_schema_extra={"allowed": "text or a list of texts, not empty, or a number > 0 and < 1, or null"},
    )
    regularization: Texts | None = Field(
        None, description="Samples that keep what the base knows, given as data.train; see loss.prior_loss_weight."
    )
    on_bad_item: Literal["error", "skip"] = Field(
        "error", description="Unusable items: stop with the list of all of them, or list them and train on the others."
    )
    empty_caption: Literal["error", "use_empty", "skip"] = Field(
        "error", description="Items without instruction: a problem, trained with the empty instruction, or left out."
    )
    caption_dropout: float = Field(
        0.0, ge=0, le=1, description="Share of samples that a step trains on the empty instruction in place of theirs."
    )
    long_caption: Literal["error", "truncate"] = Field(
        "error", description="Items whose instruction is over 1024 tokens: a problem, or trained with its beginning."
    )
    first_frame: bool = Field(
        False, description="Train on the first picture of animations and of files of several pages, else problems."
    )
    background: Annotated[str, StringConstraints(pattern=COLOUR)] = Field(
        "white",
        description="Colour under transparent pixels, in sRGB; `mixres sample` takes it from the result.",
        json_schema_extra={"allowed": 'white, gray, black, or "#rrggbb" in quotes'},
    )
    follow_symlinks: bool = Field(False, description="Read links that lead out of the data folder.")
    num_workers: int = Field(2, ge=0, le=256, description="Processes that load samples; 0 loads in the main process.")
    mask_weight: MaskWeightConfig = Field(MaskWeightConfig(), description="Loss weights of samples with an edit mask.")
    resize: ResizeConfig = Field(ResizeConfig(), description="Size rules; nothing is ever cropped.")
    limits: LimitsConfig = Field(LimitsConfig(), description="What an image file may be at most.")


class BatchConfig(Section):
    samples_per_step: int = Field(4, ge=1, le=2**20, description="Samples of one optimizer step, over all devices.")
    max_tokens: int = Field(
        16384,
        ge=1,
        le=2**31,
        description="Tokens computed in a microbatch, text and images; padded: rows x (longest text + longest images).",
    )
    layout: Literal["packed", "padded"] = Field(
        "packed",
        description="Layout of a microbatch: samples one behind the other, or rows padded to the longest.",
    )


class FlowConfig(Section):
    density: Literal["logit_normal", "uniform", "mode"] = Field(
        "logit_normal", description="Distribution of the training noise levels (Esser et al. 2024, section 3.1)."
    )
    logit_mean: float = Field(0.0, ge=-100, le=100, description="Mean of the logit-normal density.")
    logit_std: float = Field(1.0, gt=0, le=100, description="Standard deviation of the logit-normal density.")
    mode_scale: float = Field(1.29, ge=-1, le=1.75, description="Scale of the mode density.")
    shift: Literal["resolution", "constant", "none"] = Field(
        "resolution",
        description="Noise-level shift: by each target's token count as in sampling, fixed, or none.",
    )
    shift_value: float = Field(3.0, gt=0, le=100, description="The shift of flow.shift: constant.")


class LossConfig(Section):
    normalization: Literal["sample", "token"] = Field(
        "sample", description="What counts the same: every sample, or every target token of the step."
    )
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = Field("none", description="Loss weight by noise level.")
    prior_loss_weight: float = Field(
        1.0, gt=0, le=1e6, description="Loss weight of each sample of data.regularization; one of data.train has 1."
    )


class OptimizerConfig(Section):
    class_path: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")] = Field(
        "torch.optim.AdamW",
        description="The optimizer's class.",
        json_schema_extra={"allowed": "a dotted class name such as torch.optim.AdamW"},
    )
    init_args: dict[str, Any] = Field(
        {"lr": 1e-4}, description="Arguments of the optimizer's class; lr stays 1e-4 unless it is named here."
    )


class SchedulerConfig(Section):
    scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field("constant", description="Course of the learning rate (diffusers' names).")
    warmup_steps: int = Field(0, ge=0, le=10**9, description="Steps over which the learning rate rises from 0.")


class TrainConfig(Section):
    max_train_steps: int = Field(1000, ge=1, le=10**9, description="Optimizer steps of the whole run.")
    parallel: Literal["ddp", "fsdp2"] = Field(
        "ddp", description="On several devices: the weights on each of them (ddp), or split over them (fsdp2)."
    )
    max_grad_norm: float = Field(1.0, gt=0, le=1e9, description="The gradient is scaled down to this norm.")
    max_skips: int = Field(
        5, ge=0, le=10**9, description="Steps in a row that may be left out since loss or gradient is not finite."
    )
    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] = Field(
        True,
        description="Recompute activations in backward: of all blocks (true), of every n-th (n), or of none (false).",
        json_schema_extra={"allowed": "true, false or an integer >= 1"},
    )
    compile: bool = Field(False, description="Compile the blocks for training; lengths of rows are rounded up then.")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Decay of a moving average of what is trained, saved beside it; null keeps none."
    )
    mixed_precision: Literal["bf16", "no"] = Field("bf16", description="Autocast of the forward pass.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of order, noise, noise levels and adapter initialisation.")


class CacheConfig(Section):
    cache_dir: Text = Field("./cache", description="Folder of the encoded samples; runs may share it.")


class CheckpointConfig(Section):
    every: int = Field(500, ge=1, le=10**9, description="Steps between checkpoints; the last step always saves one.")
    keep: int = Field(2, ge=2, le=10**6, description="Checkpoints that stay; at least 2, so that one is always whole.")


class SampleConfig(Section):
    every: int = Field(500, ge=0, le=10**9, description="Steps between samples of data.held_out; 0 makes none.")
    steps: int = Field(20, ge=2, le=1000, description="Denoising steps of a sample.")
    use_ema: bool = Field(False, description="Sample with the moving average instead of the weights of the step.")


class EvaluateConfig(Section):
    every: int = Field(
        0, ge=0, le=10**9, description="Steps between evaluations of data.held_out, also at 0 and the end; 0: none."
    )
    sigmas: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(as_tuple), Field(min_length=1, max_length=100)
    ] = Field(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        description="Noise levels that every held-out sample is evaluated at; each costs one forward pass a sample.",
        json_schema_extra={"allowed": "a list of 1 to 100 numbers > 0 and <= 1"},
    )
    use_ema: bool = Field(False, description="Evaluate the moving average instead of the weights of the step.")


class LoggingConfig(Section):
    output_dir: Text = Field("./output", description="The run folder: config, metrics, checkpoints, samples, result.")
    report_to: Literal["none", "wandb", "tensorboard"] = Field("none", description="Tracker besides metrics.jsonl.")
    tracker_project_name: Text = Field("mixres", description="Project name in the tracker.")


# What a checkpoint fixes and a resumed run may change all the same; the adapters' shape it cannot.
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


class Config(Section):
    """A whole run. Load it with `load_config`; what may be shown of it comes from `public_config`."""

    model: ModelConfig = Field(description="The base model and what is trained of it.")
    data: DataConfig = Field(description="What is trained on, and what an image file may be.")
    batch: BatchConfig = Field(BatchConfig(), description="How many samples make a step, and a microbatch.")
    flow: FlowConfig = Field(FlowConfig(), description="Noise levels of flow matching.")
    loss: LossConfig = Field(LossConfig(), description="How errors are added up.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimizer.")
    lr_scheduler: SchedulerConfig = Field(SchedulerConfig(), description="The learning rate over the run.")
    train: TrainConfig = Field(TrainConfig(), description="The training loop.")
    cache: CacheConfig = Field(CacheConfig(), description="Where encoded samples lie.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="When the run is saved.")
    sample: SampleConfig = Field(SampleConfig(), description="Pictures of held-out pairs while training.")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="Loss on held-out samples while training.")
    logging: LoggingConfig = Field(LoggingConfig(), description="Where the run writes and reports.")
    resume: Literal["auto", "required", "never"] = Field(
        "auto", description="Go on from the newest checkpoint: if there is one, or fail, or start afresh."
    )
    resume_allow_changes: Annotated[tuple[Changeable, ...], BeforeValidator(as_tuple)] = Field(
        (),
        description="Keys that may differ from the checkpoint's; without this such a change is refused.",
        json_schema_extra={"allowed": f"a list of: {', '.join(get_args(Changeable))}"},
    )
    _references: dict[KeyPath, str] = PrivateAttr(default_factory=dict)
