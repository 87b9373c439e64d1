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
        ("sample.use_ema", "train.ema_decay"),
        lambda use_ema, decay: use_ema and decay is None,
        "set a decay for the average, such as train.ema_decay: 0.999",
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
