"""Names that other trainers give to keys: for "did you mean" alone, none of them is read."""

# By the key that they mean.
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
