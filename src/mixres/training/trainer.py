"""The training run: the loop, its checkpoints, samples and result.

Promise: the order of things and nothing else; every formula lives in the room it belongs to. The same command goes on
where it stopped, and a step is the same whatever the machine. Cost: what a step costs beyond forward, backward and
update is measured at the end of every run and printed.
"""

import json
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import Accelerator

from mixres import atomic
from mixres.config.load import dump_config, public_config
from mixres.config.schema import Config
from mixres.console import Progress, log
from mixres.data.plan import Plan, StepPlan
from mixres.errors import Stopped, WorkError
from mixres.models.family import Family
from mixres.preprocessing.fill import CachedData, CachedSample, encode, family_of, keyed_records
from mixres.training.checkpoint import Checkpoints
from mixres.training.distributed import (
    any_rank,
    assert_same_on_all_ranks,
    dist_env,
    gather,
    make_accelerator,
    replicate,
)
from mixres.training.metrics import MetricsLog, Tracker
from mixres.training.optimizer import schedule
from mixres.training.result import write_results
from mixres.training.resume import Skips, changes, check_order, checkpoint_to_resume, restore_run, save_run
from mixres.training.run_folder import RunFolder
from mixres.training.sample_sheets import sheet_writer
from mixres.training.setup import (
    TrainState,
    build_loader,
    build_objective,
    build_plan,
    check_early,
    load_trained,
    run_identity,
)
from mixres.training.step import Objective, StepResult, bare_step_seconds, run_step
from mixres.training.validation import HeldOutLoss

_BARE_STEPS = 3
_SHOWN_NAMES = 20


def train(config: Config) -> None:
    """Train as `config` says, from the newest checkpoint or from the start.

    Raises:
        UserError: configuration, base or data are wrong, or a checkpoint does not fit the run.
        WorkError: numbers that are not finite too often, a damaged cache entry, or a checkpoint that cannot be written.
        Stopped: a signal came; the run has saved.
    """
    logging, last, keep = config.logging, config.train.max_train_steps, config.checkpoint.keep
    folder, rank, public = Path(logging.output_dir), dist_env().rank, public_config(config)
    with RunFolder(folder, verb="train", max_train_steps=last, rank=rank) as run, ExitStack() as stack:
        accelerator = make_accelerator(
            mixed_precision=config.train.mixed_precision, report_to=logging.report_to, folder=folder
        )
        ranks = accelerator.num_processes
        family = family_of(config, is_main=run.main)
        check_early(config, family)
        found = keyed_records(config, family, is_main=run.main)
        assert_same_on_all_ranks(xxhash.xxh3_128_hexdigest(json.dumps([found.keys, public]).encode()))
        frozen = run_identity(config, found.train_keys(regularization=False), found.train_keys(regularization=True))
        checkpoints = Checkpoints(folder / "checkpoints", keep=keep, rank=rank, ranks=ranks, gather=gather)
        checkpoint = checkpoint_to_resume(checkpoints, config.resume, frozen, config.resume_allow_changes)
        first, skips, seconds = checkpoint.step if checkpoint else 0, Skips(), list[float]()
        run.update(step=first)
        if first >= last and any_rank(accelerator, run.was_done(first)):
            if run.main:
                log(f"done      {first} steps were done before; raise train.max_train_steps, now {last}, to go on")
            return
        encoded = encode(config, family, found, device=accelerator.device, rank=rank, world_size=ranks)
        plan = build_plan(config, encoded, world_size=ranks)
        keys = [item.key for item in encoded.train]
        assert_same_on_all_ranks(plan.plan_hash(keys))
        identity = {"frozen": frozen, "order": plan.order_hash(keys)}
        check_order(checkpoint, identity)
        if run.main:
            atomic.write_text(folder / "config.yaml", dump_config(config))
        trained = load_trained(config, family, accelerator)
        if checkpoint:
            restore_run(checkpoint, trained.parameters, trained.optimizer, kind=config.optimizer.class_path)
            skips = Skips(**checkpoint.state["skips"])
        scheduler = schedule(trained.optimizer, **config.lr_scheduler.model_dump(), max_train_steps=last, step=first)
        objective = build_objective(config, family)
        model = replicate(trained.transformer, accelerator)
        loader = build_loader(config, encoded, plan, rank=rank, first=first, workers=config.data.num_workers)
        if run.main:
            _banner(config, accelerator, trained, plan, first, changes(checkpoint, identity, public))
        metrics = stack.enter_context(MetricsLog(folder if run.main else None, step=first))
        tracker = stack.enter_context(Tracker(accelerator, logging.report_to, logging.tracker_project_name, public))
        sample = sheet_writer(config, accelerator, family, trained, encoded, run, tracker.picture)
        progress = stack.enter_context(Progress(first=first, last=last, enabled=run.main))
        evaluate = HeldOutLoss(config, accelerator, objective, trained, encoded, run, (metrics.write, tracker.log))
        run.stop_between_steps()
        if not any_rank(accelerator, metrics.evaluated) and not evaluate(first):
            raise Stopped(f"stopped by a signal before step {first + 1}: run the same command to go on")
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
            done = step + 1
            skips.count(bool(result.skipped))
            _tell_skip(result, done, skips, config.train.max_skips, is_main=run.main)
            line = _metrics_line(planned, result, lr, seconds[-1])
            metrics.write(line)
            tracker.log(line)
            progress.step(line)
            stop = result.stopping or not evaluate(done)  # before the save: what is saved is evaluated
            if done == last or stop or done % config.checkpoint.every == 0:
                state = {**identity, "config": public, "skips": asdict(skips)}
                save_run(checkpoints, trained.parameters, trained.optimizer, step=done, state=state)
                run.update(step=done)
            if stop and done < last:
                raise Stopped(f"stopped by a signal after step {done}, which is saved: run the same command to go on")
            if sample and done < last and done % config.sample.every == 0:
                sample(done)
        done = max(first, last)
        if sample:
            sample(done)
        if any_rank(accelerator, run.stop_requested):
            raise Stopped("stopped by a signal after the last step, which is saved: run the same command to go on")
        result_path = write_results(config, family, trained, folder, step=done, keep=run.main)
        accelerator.wait_for_everyone()
        if run.main:
            _say_end(config, result_path, family, encoded.train, skips, tracker.folder, sampled=sample is not None)
            _say_overhead(config, accelerator, trained, objective, encoded, plan, seconds)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """For the global generators, from which dropout draws: so that no state of theirs is needed to go on."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def _tell_skip(result: StepResult, done: int, skips: Skips, most: int, *, is_main: bool) -> None:
    """A line about a step that was left out.

    Raises:
        WorkError: it is one too many in a row.
    """
    if not result.skipped:
        return
    shown = ", ".join(result.skipped[:_SHOWN_NAMES])
    if (more := len(result.skipped) - _SHOWN_NAMES) > 0:
        shown += f" and {more} more"
    what = f"step {done}: loss {result.loss}, gradient norm {result.grad_norm}: not finite"
    if skips.consecutive > most:
        raise WorkError(
            f"{what}, and {skips.consecutive} steps in a row are more than train.max_skips = {most}; the last "
            f"checkpoint is intact: lower optimizer.init_args.lr, or look at the samples: {shown}"
        )
    if is_main:
        log(f"skipped   {what}: nothing is updated ({skips.consecutive} in a row, at most {most}). Samples: {shown}")


def _metrics_line(planned: StepPlan, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
    skipped = bool(result.skipped)  # JSON has no form for what is not finite
    return {
        "step": planned.step + 1,
        "epoch": planned.epoch,
        "loss": None if skipped else result.loss,
        "grad_norm": None if skipped else result.grad_norm,
        "lr": lr,
        "samples": planned.samples,
        "tokens": result.tokens,
        "tokens_computed": result.tokens_computed,
        "microbatches": sum(len(rank) for rank in planned.ranks),
        "seconds": seconds,
        **({"skipped": list(result.skipped)} if skipped else {}),
    }


def _banner(
    config: Config, accelerator: Accelerator, trained: TrainState, plan: Plan, first: int, changed: list[str]
) -> None:
    model, train = config.model, config.train
    name = model.pretrained_model_name_or_path
    log(f"model     {name}, {model.dtype} on {accelerator.device}, autocast {train.mixed_precision}")
    for line in trained.lines():
        log(line)
    epochs = math.ceil(train.max_train_steps / plan.steps_per_epoch)
    if first >= train.max_train_steps:
        log(f"plan      no step is left, {first} are saved: their result is written")
        return
    log(
        f"plan      steps {first + 1} to {train.max_train_steps} ({epochs} epochs), {plan.samples_per_step} samples "
        f"a step, {plan.layout}, at most {plan.max_tokens} tokens a microbatch"
    )
    if plan.caption_dropout:
        log(
            f"          each sample trains on the empty instruction in {plan.caption_dropout:.1%} of the steps it is in"
        )
    if model.lora and model.lora.lora_dropout > 0:
        log("          lora_dropout draws from the global generator: a resume is exact on as many processes only")
    for change in changed:
        log(f"changed   since the checkpoint: {change}")


def _say_end(
    config: Config,
    result: Path,
    family: Family,
    items: Sequence[CachedSample],
    skips: Skips,
    tracked: Path | None,
    *,
    sampled: bool,
) -> None:
    folder = Path(config.logging.output_dir)
    if skips.total:
        log(f"skipped   {skips.total} steps whose numbers were not finite, see {folder / 'metrics.jsonl'}")
    log(f"result    {result}{f', its average in {folder}/ema' if config.train.ema_decay else ''}")
    if sampled:
        log(f"samples   {folder / 'samples'}")
    log(f"metrics   {folder / 'metrics.jsonl'}, checkpoints in {folder / 'checkpoints'}")
    if tracked:
        log(f"tracker   {tracked}")
    images = " --image IMAGE" * family.controls[0]
    sizes = sorted((item.target_size for item in items), key=math.prod)
    size = sizes[len(sizes) // 2]  # the stock pipelines' own may be far from what was learnt
    how = f"--size {size} --steps {config.sample.steps}"
    log(f"next      mixres sample --lora {folder}{images} --prompt TEXT {how} --out FOLDER")


def _say_overhead(
    config: Config,
    accelerator: Accelerator,
    trained: TrainState,
    objective: Objective,
    encoded: CachedData,
    plan: Plan,
    seconds: list[float],
) -> None:
    """The last steps again without data, logging or clipping. The weights have been written; these are thrown away."""
    if accelerator.num_processes > 1 or not seconds:
        return  # the other ranks are done, or no step was left to do
    last = config.train.max_train_steps
    first = last - min(_BARE_STEPS, len(seconds))
    loader = build_loader(config, encoded, plan, rank=0, first=first, workers=0)
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
    log(f"overhead  a step took {ratio:.3f} x its bare forward, backward and update ({len(ratios)} steps)")
