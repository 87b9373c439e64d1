"""A validated configuration -> the parts of a run: model, plan, objective, loader.

Promise: `train`, `verify` and `bench` build a run here, so that all of them mean the same run. Cost: loading the
transformer.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from mixres import __version__
from mixres.batch import Batch
from mixres.config.schema import LYCORIS, Config
from mixres.data.loader import microbatch_loader
from mixres.data.plan import MAX_LENGTHS, Layout, LengthsOf, Plan, Rounding, rounding_of
from mixres.diffusion.flow_matching import TimestepSampler
from mixres.diffusion.objective import Objective, sample_weight
from mixres.errors import Problems, UserError
from mixres.models import hub
from mixres.models.block_swap import BlockSwap, save_activations_on_host
from mixres.models.blocks import check_compiler, compile_blocks, most_graphs, recompute_blocks
from mixres.models.family import Family
from mixres.models.lora import (
    TargetMatch,
    add_lora,
    check_pretrained,
    check_targets,
    expanded,
    measure_magnitudes,
    promote,
    train_all,
    trainable_parameters,
)
from mixres.models.pretrained import materialize, read_weights, stored_dtype, to_meta, without_values
from mixres.models.quantize import check_method
from mixres.preprocessing.fill import CachedData
from mixres.preprocessing.live_texts import text_device
from mixres.preprocessing.samples import names_of, table_of
from mixres.preprocessing.training_data import control_rules
from mixres.training.distributed import dist_env, is_split, replicate, shard
from mixres.training.ema import Ema
from mixres.training.optimizer import check_step, make_optimizer, optimizer_class

# Keys of model.lora that a resumed run keeps: what a checkpoint's weights are and what they began as.
_LORA_IDENTITY = ("r", "lora_alpha", "target_modules", "use_dora", "pretrained_weight")
_LOKR_IDENTITY = ("factor", "decompose_both")  # and which of a LoKr, in both
_LORA_STATED = {"r", "lora_alpha", "target_modules", "use_dora"}  # and what its file records


@dataclass(frozen=True)
class TrainState:
    """The patched transformer of a configuration, what is trained of it, by name in the optimizer's order, and how."""

    config: Config
    family: Family
    accelerator: Accelerator
    transformer: nn.Module
    model: nn.Module  # what a step calls: the transformer, in a wrapper where DDP replicates it
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    objective: Objective
    table: tuple[TargetMatch, ...]  # empty where all weights are trained
    ema: Ema | None

    @property
    def counts(self) -> tuple[int, int]:
        """Parameters that are trained, and all there are."""
        trained = sum(p.numel() for p in self.parameters.values())
        return trained, self.transformer.num_parameters()  # type: ignore[operator] # 4-bit weights hold two in a byte

    def lines(self) -> list[str]:
        """What is trained, as runs and reports print it: a row a target pattern, then the fraction."""
        rows = [f"          {r.pattern:<16} {r.modules:>4} layers  {r.parameters:>12,} parameters" for r in self.table]
        trained, total = self.counts
        return [*rows, f"trained   {trained:,} of {total:,} parameters ({trained / total:.2%})"]


def check_early(config: Config, family: Family) -> None:
    """Check what needs torch, before hours of encoding.

    Raises:
        UserError: the optimizer or its arguments, groups of ranks that are not alike, a tracker that is not installed,
            a guidance or steps of a shift that the base does not have, LoRA targets that match nothing, or a pretrained
            LoRA that does not fit; all at once.
    """
    problems = Problems()
    here, model, optimizer = dist_env(), config.model, config.optimizer
    tracker = config.logging.report_to
    if tracker != "none" and importlib.util.find_spec(tracker) is None:  # accelerate would ignore it silently
        problems.add(f"logging.report_to: {tracker} is not installed: pip install {tracker}, or set it to none")
    split, size = is_split(config.train.parallel), config.train.shard_size
    if split and size and here.world_size % size:
        problems.add(f"train.shard_size: {here.world_size} processes are no groups of {size}: give a divisor, or null")
    with problems.collecting():
        kind = optimizer_class(optimizer.class_path, optimizer.init_args)
        check_step(kind, optimizer.class_path, optimizer.init_args, device=here.device, split=split)
    with problems.collecting():
        if model.quantize:
            check_method(model.quantize, here.device)
        if config.train.compile:
            check_compiler(here.device)
    problems.collect(text_device, config, here.device, ranks=here.world_size)
    problems.collect(training_guidance, config, family)
    problems.collect(family.flow_shift, config.flow.shift_steps)
    skeleton = family.transformer_skeleton()
    with problems.collecting():
        if model.lora:
            untrained, presets = family.untrained_modules(skeleton), family.lora_presets
            check_targets(skeleton, model.lora.target_modules, untrained=untrained, presets=presets)
            if model.lora.pretrained_weight is not None:
                settings = model.adapter_settings()
                del settings["lora_dropout"]
                check_pretrained(skeleton, **settings, untrained=untrained, presets=presets)
    problems.raise_if_any()


def load_trained(config: Config, family: Family, accelerator: Accelerator) -> TrainState:
    """The transformer on this rank's device, its adapters (or all its weights) trainable, the optimizer over them.

    For `train.parallel: fsdp2` the weights are split over the ranks, of which none ever holds more than its rows and
    one block.

    Raises:
        WorkError: there is not enough host memory for `train.offload.blocks`.
    """
    model, train, dtype = config.model, config.train, getattr(torch, config.model.dtype)
    offload, device = train.offload, accelerator.device
    split, rows = train.parallel == "fsdp2" and accelerator.num_processes > 1, False
    if split:
        transformer, rows = _unsplit(config, family, dtype)
    else:
        where = "cpu" if offload.blocks else device
        transformer = family.load_transformer(dtype=dtype, device=where, quantize=model.quantize)
    untrained = family.untrained_modules(transformer)
    if model.lora:
        settings = model.adapter_settings()
        presets, seed = family.lora_presets, train.seed
        table = add_lora(transformer, **settings, untrained=untrained, seed=seed, presets=presets)
    else:
        table = train_all(transformer, untrained=untrained)
    if train.gradient_checkpointing:
        recompute_blocks(transformer, every=int(train.gradient_checkpointing))
    if offload.blocks:
        BlockSwap(transformer, keep=offload.blocks, device=device)
    if offload.activations:
        save_activations_on_host(transformer, device)
    if train.compile:
        compile_blocks(transformer, graphs=most_graphs(rows=config.batch.samples_per_step, lengths=MAX_LENGTHS))
    if split:
        _split(config, family, accelerator, transformer, rows=rows)
    if model.lora is None:
        promote(transformer, dtype)
    wrapped = transformer if split else replicate(transformer, accelerator)
    parameters, chosen = trainable_parameters(transformer), config.optimizer
    optimizer = make_optimizer(chosen.class_path, chosen.init_args, parameters.values(), device=accelerator.device)
    ema = Ema(optimizer, train.ema_decay) if train.ema_decay else None
    objective = build_objective(config, family)
    return TrainState(
        config, family, accelerator, transformer.train(), wrapped, parameters, optimizer, objective, tuple(table), ema
    )


def _unsplit(config: Config, family: Family, dtype: torch.dtype) -> tuple[Any, bool]:
    """A transformer that takes no memory of its own until it is split, and whether its rows are to be read then.

    Else its weights are the files, mapped. Adapters begin in the precision of the base, so that has to be the files'.
    """
    folder = family.transformer_folder()
    stored = None if folder is None else stored_dtype(folder)
    if stored is None or config.train.shard_read == "rows" or (config.model.lora and stored != dtype):
        return without_values(family.transformer_skeleton(), dtype), True
    return family.load_transformer(dtype=stored, device="cpu"), False


def _split(config: Config, family: Family, accelerator: Accelerator, transformer: nn.Module, *, rows: bool) -> None:
    """Split the transformer over the ranks; where it has no values yet, read its `rows`."""
    train, lora = config.train, config.model.lora
    if rows:
        to_meta(transformer)
    shard(
        transformer,
        accelerator.device,
        size=train.shard_size or accelerator.num_processes,
        half=train.mixed_precision == "bf16",
        cpu_offload=train.cpu_offload,
    )
    if rows:
        materialize(transformer, torch.device("cpu") if train.cpu_offload else accelerator.device)
        if folder := family.transformer_folder():
            read_weights(transformer, folder)
        if lora and lora.use_dora and lora.pretrained_weight is None:
            measure_magnitudes(transformer)


def build_objective(config: Config, family: Family) -> Objective:
    """What is minimised, with the shift constants of the base."""
    model, flow = config.model, config.flow
    return Objective(
        predict_velocity=family.predict_velocity,
        timesteps=TimestepSampler(**flow.model_dump(exclude={"shift_steps"})),
        weighting=config.loss.weighting,
        shift_constants=family.flow_shift(flow.shift_steps),
        normalization=config.loss.normalization,
        foreground=config.data.mask_weight.foreground,
        background=config.data.mask_weight.background,
        seed=config.train.seed,
        dtype=torch.float64 if model.dtype == "float64" else torch.float32,
        guidance=training_guidance(config, family),
    )


def training_guidance(config: Config, family: Family) -> float | None:
    """What a transformer that takes guidance is given in training; None for others.

    Raises:
        UserError: `model.guidance` is given for one of the others.
    """
    given, own = config.model.guidance, family.embedded_guidance()
    if own is None and given is not None:
        base = config.model.pretrained_model_name_or_path
        raise UserError(f"model.guidance: the transformer of {base} takes no guidance: leave it out")
    return own.training if own and given is None else given


def build_plan(config: Config, encoded: CachedData, *, world_size: int, plan_type: Callable[..., Plan] = Plan) -> Plan:
    """The plan of all steps over `world_size` ranks, in the configured layout. Raises as `make_plan` does."""
    table, names = table_of(encoded.train), names_of(encoded.train)
    prior, regularization = config.loss.prior_loss_weight, table["regularization"]
    if regularization.all():
        raise UserError("data.train: there is no usable sample; add some")
    own, other = (sample_weight(regularization=which, prior_loss_weight=prior) for which in (False, True))
    weights = np.where(regularization, other, own)
    return make_plan(
        config, table["lengths"], names, weights, layout=config.batch.layout, world_size=world_size, plan_type=plan_type
    )


def make_plan(
    config: Config,
    lengths: LengthsOf,
    names: Sequence[str],
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    layout: Layout,
    world_size: int,
    plan_type: Callable[..., Plan] = Plan,
) -> Plan:
    """The configuration's steps over these samples, each of which counts with its weight or 1.

    `plan_type`: what else is given the arguments of `Plan`, for other orders.

    Raises:
        UserError: samples that are over `batch.max_tokens` alone, or no samples.
    """
    rounding = row_rounding(config, lengths)
    return plan_type(
        rounding.table(lengths),
        names=names,
        weights=weights,
        seed=config.train.seed,
        samples_per_step=config.batch.samples_per_step,
        max_tokens=config.batch.max_tokens,
        layout=layout,
        world_size=world_size,
        caption_dropout=config.data.caption_dropout,
    )


def row_rounding(config: Config, lengths: LengthsOf) -> Rounding:
    """Compiled blocks want few different lengths; without them rows are padded to the longest alone."""
    return rounding_of(lengths) if config.train.compile else Rounding()


def build_loader(
    config: Config, encoded: CachedData, plan: Plan, *, rank: int, first: int, workers: int
) -> Iterator[Batch]:
    """The batches of `rank` from optimizer step `first` to the run's end."""
    rounding = row_rounding(config, table_of(encoded.train)["lengths"])
    dataset = encoded.dataset(encoded.train, config.batch.layout, rounding)
    return microbatch_loader(dataset, plan, rank=rank, first=first, last=config.train.max_train_steps, workers=workers)


def run_identity(config: Config, family: Family, own: Sequence[str], regularization: Sequence[str]) -> dict[str, Any]:
    """What a resumed run must have in common with the one it resumes, by key; known before anything is encoded.

    `own`, `regularization`: the keys of the entries of the training samples and of the regularisation set.
    """
    lora, kind = _lora_values(config, family), config.model.adapter
    return {
        "model.pretrained_model_name_or_path": config.model.pretrained_model_name_or_path,
        "model.revision": _commit(config) or config.model.revision,
        "model.dtype": config.model.dtype,
        "model.quantize": config.model.quantize,
        **{f"model.lora.{name}": lora.get(name) for name in _LORA_IDENTITY},
        **({"model.adapter": kind} if kind in LYCORIS else {}),  # checkpoints of earlier versions have none
        **{f"model.lora.{name}": lora.get(name) for name in _LOKR_IDENTITY if kind == "lokr"},
        "optimizer.class_path": config.optimizer.class_path,
        "train.seed": config.train.seed,
        "train.ema_decay": config.train.ema_decay,
        "batch.samples_per_step": config.batch.samples_per_step,
        "data.caption_dropout": config.data.caption_dropout,
        **({"cache.text": config.cache.text} if config.cache.text else {}),  # as saved before there was the key
        "data.train": _fingerprint(own),
        "data.regularization": _fingerprint(regularization),
    }


def _lora_values(config: Config, family: Family) -> dict[str, Any]:
    """The keys of `model.lora`, presets as the layers that they stand for."""
    lora = config.model.lora
    if lora is None:
        return {}
    return lora.model_dump(mode="json") | {"target_modules": expanded(lora.target_modules, family.lora_presets)}


def _fingerprint(keys: Sequence[str]) -> str | None:
    digest = xxhash.xxh3_64_hexdigest(" ".join(keys).encode())
    return f"{len(keys)} samples of fingerprint {digest}" if keys else None


def _commit(config: Config) -> str | None:
    """Of the base where it is on the Hub: a branch may be another one tomorrow. A folder has none."""
    return hub.commit(config.model.pretrained_model_name_or_path, revision=config.model.revision)


def recipe(config: Config, family: Family, step: int) -> dict[str, Any]:
    """What a LoRA file or a trained transformer records of its training, so that sampling needs no configuration."""
    adapter = config.model.adapter
    stated = _LORA_STATED | ({*_LOKR_IDENTITY} if adapter == "lokr" else set())
    return {
        "format": 1,
        "mixres": __version__,
        "family": family.name,
        "base": config.model.pretrained_model_name_or_path,
        "revision": _commit(config),
        "quantize": config.model.quantize,
        "background": config.data.background,
        **({"adapter": adapter} if adapter in LYCORIS else {}),
        **({"text": config.cache.text} if config.cache.text else {}),
        **{name: value for name, value in _lora_values(config, family).items() if name in stated},
        **control_rules(config, family),
        "target_size": config.data.resize.target.model_dump(),
        "step": step,
    }
