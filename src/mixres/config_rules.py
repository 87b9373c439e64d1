"""What keys of a configuration may not be together. Cost: none; the rules are data."""

from mixres.config_faults import Rule

# What no single key can tell: the keys, when they clash, and what mends it.
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
