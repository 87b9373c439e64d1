"""What keys of a configuration may not be together, and what other trainers call them. Cost: none; all is data."""

from mixres.config.problems import Rule

# What people who come from other trainers write, by the key that they mean: for "did you mean" alone, none is read.
ELSEWHERE = {
    "model.pretrained_model_name_or_path": "name name_or_path model_name base_model model_path pretrained_model dit",
    "model.family": "arch architecture model_type trainer",
    "model.quantize": "quantization quantize_base base_model_precision fp8_base",
    "model.lora": "network adapter peft",
    "model.lora.r": "rank lora_rank network_dim dim linear",
    "model.lora.lora_alpha": "alpha network_alpha linear_alpha",
    "model.lora.lora_dropout": "dropout network_dropout",
    "model.lora.target_modules": "lora_target_modules lora_layers",
    "model.lora.pretrained_weight": "network_weights lora_checkpoint",
    "data.train": "dataset dataset_path dataset_base_path dataset_config dataset_name datasets folder_path data_dir "
    "image_dir image_directory img_dir instance_data_dir train_data_dir",
    "data.held_out": "validation_data validation_dataset eval_dataset validation_split",
    "data.regularization": "class_data_dir reg_data_dir is_reg",
    "data.caption_dropout": "caption_dropout_rate caption_dropout_probability",
    "data.resize.target.max_pixels": "resolution target_size target_pixels target_area max_area image_size",
    "data.resize.control.area": "controls_size controls_pixels control_resolution control_size",
    "data.limits.max_aspect": "max_aspect_ratio max_ar",
    "data.mask_weight.foreground": "foreground_weight forground_weight",
    "data.mask_weight.background": "background_weight",
    "batch.samples_per_step": "batch_size train_batch_size per_device_train_batch_size micro_batch_size "
    "micro_batch_size_per_gpu gradient_accumulation_steps gradient_accumulation",
    "flow.density": "timestep_sampling timestep_type timestep_sample_method",
    "flow.shift_value": "discrete_flow_shift flow_shift timestep_shift",
    "loss.weighting": "weighting_scheme",
    "optimizer.class_path": "optimizer_type optim",
    "optimizer.init_args.lr": "lr learning_rate",
    "optimizer.init_args.weight_decay": "weight_decay adam_weight_decay",
    "optimizer.init_args.betas": "betas",
    "lr_scheduler.scheduler_type": "lr_scheduler_type scheduler",
    "lr_scheduler.warmup_steps": "lr_warmup_steps num_warmup_steps",
    "train.max_train_steps": "steps max_step max_steps train_steps num_train_steps num_epochs epochs "
    "max_train_epochs num_train_epochs",
    "train.max_grad_norm": "gradient_clipping clip_grad_norm",
    "train.ema_decay": "ema",
    "cache.cache_dir": "cache_directory latent_cache_dir",
    "checkpoint.every": "checkpointing_steps save_steps save_every save_every_n_steps",
    "checkpoint.keep": "checkpoints_total_limit save_total_limit max_step_saves_to_keep",
    "sample.every": "sample_every sample_every_n_steps validation_steps",
    "evaluate.every": "eval_steps eval_every eval_every_n_steps",
    "logging.output_dir": "output_path save_path save_dir training_folder",
    "logging.report_to": "log_with",
    "logging.tracker_project_name": "project project_name wandb_project",
    "resume": "resume_from_checkpoint",
}
OTHER_NAMES = {name: key for key, names in ELSEWHERE.items() for name in names.split()}

# What no single key can tell: the keys, when they clash, and what fixes it.
RULES: tuple[Rule, ...] = (
    (
        ("optimizer.init_args.lr",),
        lambda lr: isinstance(lr, bool | str | list | dict) or lr is None or lr < 0,
        "allowed: a number >= 0",
    ),
    (
        ("model.dtype", "train.mixed_precision"),
        lambda dtype, precision: dtype == "float64" and precision != "no",
        "set train.mixed_precision: no, which float64 needs",
    ),
    (
        ("model.quantize", "model.lora"),
        lambda method, lora: method is not None and lora is None,
        "quantised weights cannot be trained: train a LoRA on them, or set model.quantize: null",
    ),
    (
        ("model.quantize", "model.dtype"),
        lambda method, dtype: method is not None and dtype == "float64",
        "quantised weights compute in bfloat16 or float32: choose one",
    ),
    (
        ("model.quantize", "train.parallel"),
        lambda method, parallel: method is not None and parallel == "fsdp2",
        "quantised weights cannot be split over devices: set train.parallel: ddp, or model.quantize: null",
    ),
    (
        ("train.compile", "batch.layout"),
        lambda compiled, layout: compiled and layout == "packed",
        "lengths of packed samples are constants of a compiled graph, each batch would be compiled anew: write padded",
    ),
    (
        ("train.compile", "train.parallel"),
        lambda compiled, parallel: compiled and parallel == "fsdp2",
        "compiled blocks are not split over devices: set train.parallel: ddp, or train.compile: false",
    ),
    (
        ("train.compile", "model.quantize"),
        lambda compiled, method: compiled and method is not None,
        "quantised layers are not compiled: set one of them to its default",
    ),
    (
        ("train.compile", "model.lora"),
        lambda compiled, lora: compiled and lora is not None and lora.get("use_dora"),
        "DoRA layers cannot be compiled: set train.compile: false, or model.lora.use_dora: false",
    ),
    (
        ("sample.use_ema", "train.ema_decay"),
        lambda use_ema, decay: use_ema and decay is None,
        "set a decay for the average, such as train.ema_decay: 0.999",
    ),
    (
        ("loss.prior_loss_weight", "data.regularization"),
        lambda weight, regularization: weight != 1 and regularization is None,
        "there are no samples that it weighs, name some in data.regularization",
    ),
    (
        ("evaluate.use_ema", "train.ema_decay"),
        lambda use_ema, decay: use_ema and decay is None,
        "there is no average without a decay, set one such as train.ema_decay: 0.999",
    ),
    (
        ("evaluate.sigmas",),
        lambda sigmas: isinstance(sigmas, list) and len(set(sigmas)) < len(sigmas),
        "name each noise level only once",
    ),
    (
        ("lr_scheduler.warmup_steps", "train.max_train_steps"),
        lambda warmup, steps: warmup > steps,
        "shorten the warm-up, it must not be longer than the run",
    ),
    (
        ("lr_scheduler.scheduler_type", "lr_scheduler.warmup_steps"),
        lambda scheduler, warmup: scheduler == "constant" and warmup > 0,
        "constant has no warm-up, write constant_with_warmup",
    ),
    (
        ("data.mask_weight.foreground", "data.mask_weight.background"),
        lambda foreground, background: foreground == background == 0,
        "raise one, at least one must be above 0",
    ),
)
