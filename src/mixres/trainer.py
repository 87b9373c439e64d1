"""The training run: the loop, its checkpoints, samples and result.

Promise: the order of things and nothing else; every formula lives in the room it belongs to. The same command goes on
where it stopped, and a step is the same whatever the machine. Cost: what a step costs beyond forward, backward and
update is measured at the end of every run and printed.
"""

import math
import shutil
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mixres import atomic
from mixres.assemble import Trained, check_early, frozen_fields, load_trained, loader_of, objective_of, plan_of, recipe
from mixres.config import Config, dump_config, public_config
from mixres.data.plan import Plan, StepPlan
from mixres.errors import Stopped, UserError, WorkError
from mixres.models.lora import FILE_NAME, lora_file
from mixres.precompute import Encoded, encode_all, family_of
from mixres.sampling import HeldOutSampler
from mixres.training.checkpoint import Checkpoint, Checkpoints
from mixres.training.distributed import make_accelerator, replicate, require_agreement, sharded_like, whole
from mixres.training.metrics import MetricsLog, Tracker
from mixres.training.optim import optimizer_scalars, optimizer_tensors, restore_optimizer, schedule
from mixres.training.progress import Progress, say
from mixres.training.run import RunFolder
from mixres.training.step import Objective, StepResult, bare_step_seconds, run_step

_BARE_STEPS = 3


def train(config: Config) -> None:
    """Train as `config` says, from the newest checkpoint or from the start.

    Raises:
        UserError: configuration, base or data are wrong, or a checkpoint does not fit the run.
        WorkError: loss or gradient is not finite, a cache entry was damaged, or a checkpoint could not be written.
        Stopped: a signal came; the run has saved.
    """
    folder, last = Path(config.logging.output_dir), config.train.max_train_steps
    accelerator = make_accelerator(
        mixed_precision=config.train.mixed_precision, report_to=config.logging.report_to, folder=folder
    )
    rank = accelerator.process_index
    with RunFolder(folder, verb="train", max_train_steps=last, rank=rank) as run, ExitStack() as stack:
        family = family_of(config)
        check_early(config, family)
        world_size = accelerator.num_processes
        encoded = encode_all(config, family, device=accelerator.device, rank=rank, world_size=world_size)
        plan = plan_of(config, encoded, world_size=world_size)
        require_agreement(accelerator, plan.plan_hash([item.key for item in encoded.train]))
        frozen = frozen_fields(config, plan, encoded)
        checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
        checkpoint = _checkpoint_to_resume(config, checkpoints, frozen)
        first = checkpoint.step if checkpoint else 0
        run.update(step=first)
        if _has_ended(accelerator, run, first, last):
            return
        if run.main:
            atomic.write_text(folder / "config.yaml", dump_config(config))
        trained = load_trained(config, family, accelerator)
        if checkpoint:
            _restore(trained, checkpoint)
        scheduler = schedule(trained.optimizer, **config.lr_scheduler.model_dump(), max_train_steps=last, step=first)
        objective = objective_of(config, family)
        model = replicate(trained.transformer, accelerator)
        # Sharded weights are gathered block by block as they are used: then every rank has to sample along.
        sampling = (run.main or config.train.parallel == "fsdp2") and config.sample.every > 0 and encoded.held_out
        sampler = HeldOutSampler(config, family, trained.transformer, encoded) if sampling else None
        loader = loader_of(config, encoded, plan, rank=rank, first=first, workers=config.data.num_workers)
        _banner(config, accelerator, trained, plan, first, speak=run.main)
        seconds: list[float] = []
        metrics = stack.enter_context(MetricsLog(folder if run.main else None, step=first))
        logging, public = config.logging, public_config(config)
        tracker = stack.enter_context(Tracker(accelerator, logging.report_to, logging.tracker_project_name, public))
        progress = stack.enter_context(Progress(first=first, last=last, enabled=run.main))
        run.stop_between_steps()
        for step in range(first, last):
            start = time.perf_counter()
            planned = plan.step(step)
            count = len(planned.ranks[rank])
            lr = float(scheduler.get_last_lr()[0])
            torch.manual_seed(_step_seed(config.train.seed, step, rank))
            result = run_step(
                accelerator,
                model,
                trained.optimizer,
                scheduler,
                objective,
                (next(loader) for _ in range(count)),
                count=count,
                step=step,
                divisor=objective.divisor(planned.samples, planned.target_tokens),
                max_grad_norm=config.train.max_grad_norm,
                stop_requested=run.stop_requested,
            )
            seconds.append(time.perf_counter() - start)
            line = _metrics_line(planned, result, lr, seconds[-1])
            metrics.write(line)
            tracker.log(line)
            progress.step(line)
            done = step + 1
            stopping = result.stopping and done < last
            if done == last or stopping or done % config.checkpoint.every == 0:
                _save(checkpoints if run.main else None, trained, done, frozen)
                run.update(step=done)
            if stopping:
                raise Stopped(f"stopped by a signal after step {done}, which is saved: run the same command to go on")
            if sampler and done < last and done % config.sample.every == 0:
                sampler.write(folder / "samples" / f"step-{done:08d}.png", keep=run.main)
        done = max(first, last)
        if sampler:
            sampler.write(folder / "samples" / f"step-{done:08d}.png", keep=run.main)
        result_path = _write_result(config, family, trained, folder, step=done, keep=run.main)
        accelerator.wait_for_everyone()
        if run.main:
            _say_end(folder, result_path, sampler is not None)
            _say_overhead(config, accelerator, trained, objective, encoded, plan, seconds)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """For the global generators, from which dropout draws: so that no state of theirs is needed to go on."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def _has_ended(accelerator: Accelerator, run: RunFolder, first: int, last: int) -> bool:
    """Whether all steps are done and the result is written, by the word of the one process that writes."""
    word = torch.tensor(float(run.was_done(first)), device=accelerator.device)
    ended = first >= last and bool(accelerator.reduce(word, "sum"))
    if ended and run.main:
        say(f"done      all {first} steps were done before; raise train.max_train_steps to go on")
    return ended


def _checkpoint_to_resume(config: Config, checkpoints: Checkpoints, frozen: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from, None to start afresh.

    Raises:
        UserError: one is required and there is none, none of those there is valid, or it is of another run.
    """
    if config.resume == "never":
        if checkpoints.any():
            raise UserError(
                f"resume: never, but {checkpoints.root} holds checkpoints: remove them, or choose another "
                "logging.output_dir"
            )
        return None
    found = checkpoints.newest_valid()
    if found is None:
        if checkpoints.any():
            raise UserError(f"resume: no checkpoint in {checkpoints.root} is whole: remove them to start afresh")
        if config.resume == "required":
            raise UserError(f"resume: required, but there is no checkpoint in {checkpoints.root}")
        return None
    saved = found.state["frozen"]
    changed = [
        f"{key}: checkpoint {found.path.name} was made with {saved.get(key)}, this run has {value}: change it back, or "
        "choose another logging.output_dir"
        for key, value in frozen.items()
        if saved.get(key) != value
    ]
    if changed:
        raise UserError(changed)
    return found


def _save(checkpoints: Checkpoints | None, trained: Trained, step: int, frozen: Mapping[str, Any]) -> None:
    """On all ranks, since sharded tensors are put together; the rank that has `checkpoints` writes."""
    tensors: dict[str, dict[str, torch.Tensor]] = {
        "trainable": whole(trained.parameters),
        "optimizer": whole(optimizer_tensors(trained.optimizer, trained.parameters)),
    }
    scalars = optimizer_scalars(trained.optimizer, trained.parameters)
    if not checkpoints:
        return
    try:
        checkpoints.save(step, tensors, {"frozen": dict(frozen), "optimizer": scalars})
    except OSError as error:
        needed = sum(tensor.numel() * tensor.element_size() for group in tensors.values() for tensor in group.values())
        raise WorkError(
            f"{checkpoints.root}: the checkpoint of step {step} needs {needed:,} bytes and could not be written "
            f"({error.strerror or error}); those before it are intact: make room and run the same command again"
        ) from error


def _restore(trained: Trained, checkpoint: Checkpoint) -> None:
    saved = checkpoint.tensors("trainable")
    assert saved.keys() == trained.parameters.keys(), "frozen fields agree, so the names do"
    with torch.no_grad():
        for name, parameter in trained.parameters.items():
            parameter.copy_(sharded_like(saved[name], parameter))
    restore_optimizer(
        trained.optimizer, trained.parameters, checkpoint.tensors("optimizer"), checkpoint.state["optimizer"]
    )


def _metrics_line(planned: StepPlan, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
    return {
        "step": planned.step + 1,
        "epoch": planned.epoch,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "samples": planned.samples,
        "tokens": result.tokens,
        "tokens_computed": result.tokens_computed,
        "microbatches": sum(len(rank) for rank in planned.ranks),
        "seconds": seconds,
    }


def _write_result(config: Config, family: ModuleType, trained: Trained, folder: Path, *, step: int, keep: bool) -> Path:
    """The LoRA file, or the transformer in the base's precision. On all ranks; the one that is to `keep` it writes."""
    path = folder / (FILE_NAME if config.model.lora else "transformer")
    if config.model.lora:
        data = lora_file(whole(trained.parameters), trained.transformer, recipe(config, family, step))
        if keep:
            atomic.write_bytes(path, data)
        return path
    dtype = getattr(torch, config.model.dtype)
    weights = {name: tensor.to(dtype) for name, tensor in whole(trained.transformer.state_dict()).items()}
    if keep:  # through a model of the same shape: the trained one may be sharded
        model = family.transformer_skeleton(config.model.pretrained_model_name_or_path, revision=config.model.revision)
        model.load_state_dict(weights, assign=True)
        partial = folder / f"{atomic.TMP_PREFIX}transformer"
        for old in (partial, path):
            shutil.rmtree(old, ignore_errors=True)
        model.save_pretrained(partial)
        partial.rename(path)
    return path


def _banner(config: Config, accelerator: Accelerator, trained: Trained, plan: Plan, first: int, *, speak: bool) -> None:
    if not speak:
        return
    model, train = config.model, config.train
    name = model.pretrained_model_name_or_path
    say(f"model     {name}, {model.dtype} on {accelerator.device}, autocast {train.mixed_precision}")
    for line in trained.lines():
        say(line)
    epochs = math.ceil(train.max_train_steps / plan.steps_per_epoch)
    say(
        f"plan      steps {first + 1} to {train.max_train_steps} ({epochs} epochs), {plan.samples_per_step} samples "
        f"a step, {plan.layout}, at most {plan.max_tokens} tokens a microbatch"
    )
    if plan.caption_dropout:
        say(
            f"          each sample trains on the empty instruction in {plan.caption_dropout:.1%} of the steps it is in"
        )
    if model.lora and model.lora.lora_dropout > 0:
        say("          lora_dropout draws from the global generator: a resume is exact on as many processes only")


def _say_end(folder: Path, result: Path, sampled: bool) -> None:
    say(f"result    {result}")
    if sampled:
        say(f"samples   {folder / 'samples'}")
    say(f"metrics   {folder / 'metrics.jsonl'}, checkpoints in {folder / 'checkpoints'}")


def _say_overhead(
    config: Config,
    accelerator: Accelerator,
    trained: Trained,
    objective: Objective,
    encoded: Encoded,
    plan: Plan,
    seconds: list[float],
) -> None:
    """The last steps again without data, logging or clipping. The weights have been written; these are thrown away."""
    if accelerator.num_processes > 1 or not seconds:
        return  # the other ranks are done, or no step was left to do
    last = config.train.max_train_steps
    first = last - min(_BARE_STEPS, len(seconds))
    loader = loader_of(config, encoded, plan, rank=0, first=first, workers=0)
    ratios = []
    for step in range(first, last):
        planned = plan.step(step)
        batches = [next(loader) for _ in planned.ranks[0]]
        divisor = objective.divisor(planned.samples, planned.target_tokens)
        bare = bare_step_seconds(
            accelerator, trained.transformer, trained.optimizer, objective, batches, step=step, divisor=divisor
        )
        ratios.append(seconds[step - last] / bare)
    ratio = statistics.median(ratios)
    say(f"overhead  a step took {ratio:.3f} x its bare forward, backward and update ({len(ratios)} steps)")
