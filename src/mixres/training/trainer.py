"""The training run: setup, the loop, checkpoints, evaluation, samples and the result, in the order they happen.

Promise: every formula lives in the module it belongs to; here is their order. The same command resumes where the run
stopped, and a step is the same whatever the machine.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from mixres import atomic
from mixres.config.load import FROZEN, dump_config, public_config
from mixres.config.schema import Config
from mixres.console import Progress, log
from mixres.data.decode import Share
from mixres.data.plan import Plan, StepPlan
from mixres.errors import Stopped, WorkError
from mixres.geometry import Size
from mixres.preprocessing.fill import encode, family_of, keyed_records
from mixres.preprocessing.samples import CachedSample, keys_of, table_of
from mixres.training.checkpoint import Checkpoints
from mixres.training.distributed import (
    any_rank,
    assert_same_on_all_ranks,
    dist_env,
    gather,
    is_split,
    make_accelerator,
)
from mixres.training.metrics import MetricsLog, Tracker
from mixres.training.optimizer import Schedule
from mixres.training.result import TRAINING_SET, training_set, write_results
from mixres.training.resume import Skips, changes, check_order, checkpoint_to_resume, restore_run, save_run
from mixres.training.run_folder import RunFolder
from mixres.training.sample_sheets import grid_writer
from mixres.training.setup import TrainState, build_loader, build_plan, check_early, load_trained, run_identity
from mixres.training.step import StepResult, run_step
from mixres.training.validation import HeldOutLoss

_SHOWN_NAMES = 20


def train(config: Config, *, plan_type: Callable[..., Plan] = Plan) -> None:
    """Train as `config` says, from the newest checkpoint or from the start; `plan_type` as in `make_plan`.

    Raises:
        UserError: configuration, base or data are wrong, or a checkpoint does not fit the run.
        WorkError: numbers that are not finite too often, a damaged cache entry, or a checkpoint that cannot be written.
        Stopped: a signal came; the run has saved.
    """
    logging, last, rank = config.logging, config.train.max_train_steps, dist_env().rank
    folder, public = Path(logging.output_dir), public_config(config)
    with RunFolder(folder, verb="train", max_train_steps=last, rank=rank) as run, ExitStack() as stack:
        split = is_split(config.train.parallel)
        accelerator = make_accelerator(
            mixed_precision="no" if split else config.train.mixed_precision,
            report_to=logging.report_to,
            folder=folder,
            cpu_offload=split and config.train.cpu_offload,
            timeout_minutes=config.train.timeout_minutes,
            deterministic=config.train.deterministic,
        )
        ranks = accelerator.num_processes

        # All that can be wrong is found here, before anything is encoded or loaded.
        family = family_of(config, is_main=run.is_main)
        check_early(config, family)
        records = keyed_records(config, family, is_main=run.is_main, share=Share(rank, ranks), known=True)
        assert_same_on_all_ranks(xxhash.xxh3_128_hexdigest(json.dumps([records.keys, public]).encode()))

        # What is there to resume?
        own, regularization = (records.train_keys(regularization=which) for which in (False, True))
        frozen = run_identity(config, family, own, regularization)
        checkpoints = Checkpoints(
            folder / "checkpoints", keep=config.checkpoint.keep, rank=rank, ranks=ranks, gather=gather
        )
        checkpoint = checkpoint_to_resume(
            checkpoints, config.resume, frozen, config.resume_allow_changes, family.lora_presets
        )
        first = checkpoint.step if checkpoint else 0
        run.update(step=first)
        if first >= last and any_rank(run.was_done(first)):
            if run.is_main:
                log(f"done      {first} steps were done before; raise train.max_train_steps, now {last}, to train more")
            return

        # Data: a full cache, and the plan of all steps.
        share = {"rank": rank, "world_size": ranks, "keep": accelerator.is_local_main_process}
        encoded = encode(config, family, records, device=accelerator.device, **share)
        plan = build_plan(config, encoded, world_size=ranks, plan_type=plan_type)
        keys = keys_of(encoded.train)
        assert_same_on_all_ranks(plan.plan_hash(keys))
        identity = {"frozen": frozen, "order": plan.order_hash(keys)}
        check_order(checkpoint, identity)
        if run.is_main:
            atomic.write_text(folder / FROZEN, dump_config(config))
            atomic.write_json(folder / TRAINING_SET, training_set(encoded.train))

        # Model, optimizer, objective, schedule, batches.
        if encoded.texts:
            encoded.texts.load()
        trained = load_trained(config, family, accelerator)
        skips = Skips()
        if checkpoint:
            restore_run(checkpoint, trained.parameters, trained.optimizer, kind=config.optimizer.class_path)
            skips = Skips(**checkpoint.state["skips"])
        schedule = Schedule(trained.optimizer, **config.lr_scheduler.model_dump(), max_train_steps=last)
        loader = build_loader(config, encoded, plan, rank=rank, first=first, workers=config.data.num_workers)
        if run.is_main:
            _log_start(trained, plan, first, changes(checkpoint, identity, public))

        # What watches the run.
        metrics = stack.enter_context(MetricsLog(folder if run.is_main else None, step=first))
        tracker = stack.enter_context(Tracker(accelerator, logging.report_to, logging.tracker_project_name, public))
        sinks = metrics.write, tracker.log
        sample = grid_writer(trained, encoded, run, tracker.log_image, sinks)
        progress = stack.enter_context(Progress(first=first, last=last, enabled=run.is_main))
        evaluate = HeldOutLoss(trained, encoded, run, sinks)

        run.stop_between_steps()
        if not any_rank(metrics.evaluated) and not evaluate(first):
            raise Stopped(f"stopped by a signal before step {first + 1}: run the same command to resume")
        for step in range(first, last):
            start = time.perf_counter()
            planned = plan.step(step)
            count = len(planned.ranks[rank])
            lr = schedule.set(step)
            torch.manual_seed(_step_seed(config.train.seed, step, rank))
            result = run_step(
                accelerator,
                trained.model,
                trained.optimizer,
                trained.objective,
                (next(loader) for _ in range(count)),
                count=count,
                step=step,
                divisor=trained.objective.divisor(planned.samples, planned.target_tokens),
                max_grad_norm=config.train.max_grad_norm,
                stop_requested=run.stop_requested,
            )
            seconds, done = time.perf_counter() - start, step + 1
            skips.count(bool(result.skipped))
            _log_skip(result, done, skips, config.train.max_skips, is_main=run.is_main)
            line = _metrics_line(planned, result, lr, seconds)
            metrics.write(line)
            tracker.log(line)
            progress.step(line)
            stop = result.stopping or not evaluate(done)  # before the save: what is saved is evaluated
            if done == last or stop or done % config.checkpoint.every == 0:
                state = {**identity, "config": public, "skips": asdict(skips)}
                save_run(checkpoints, trained.parameters, trained.optimizer, step=done, state=state)
                run.update(step=done)
            if stop and done < last:
                raise Stopped(f"stopped by a signal after step {done}, which is saved: run the same command to resume")
            if sample and done < last and done % config.sample.every == 0:
                sample(done)

        if any_rank(run.stop_requested):
            raise Stopped("stopped by a signal after the last step, which is saved: run the same command to resume")
        done = max(first, last)
        result_path = write_results(trained, folder, step=done, keep=run.is_main)
        gather(None)
        if sample:  # after the result, which no failure or signal in the last grid can take away any more
            sample(done)
        if run.is_main:
            _log_end(trained, result_path, encoded.train, skips, sampled=sample is not None)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """For the global generators, from which dropout draws: so that a resume needs no state of theirs."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def _log_skip(result: StepResult, done: int, skips: Skips, max_skips: int, *, is_main: bool) -> None:
    """Log a step that was skipped.

    Raises:
        WorkError: it is one too many in a row.
    """
    if not result.skipped:
        return
    shown = f"{', '.join(result.skipped[:_SHOWN_NAMES])} ({len(result.skipped)} in all)"
    what = f"step {done}: loss {result.loss}, gradient norm {result.grad_norm}: not finite"
    if skips.consecutive > max_skips:
        raise WorkError(
            f"{what}, and {skips.consecutive} steps in a row are more than train.max_skips = {max_skips}; the last "
            f"checkpoint is intact: lower optimizer.init_args.lr, or look at the samples: {shown}"
        )
    if is_main:
        in_a_row = f"{skips.consecutive} in a row, at most {max_skips}"
        log(f"skipped   {what}: nothing is updated ({in_a_row}). Samples: {shown}")


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


def _log_start(trained: TrainState, plan: Plan, first: int, changed: list[str]) -> None:
    model, train, device = trained.config.model, trained.config.train, trained.accelerator.device
    log(f"model     {model.pretrained_model_name_or_path}, {model.dtype} on {device}, autocast {train.mixed_precision}")
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
    if model.lora and model.lora.lora_dropout > 0:
        log("          lora_dropout draws from the global generator: a resume is exact on as many processes only")
    for change in changed:
        log(f"changed   since the checkpoint: {change}")


def _log_end(
    trained: TrainState, result: Path, samples: Sequence[CachedSample], skips: Skips, *, sampled: bool
) -> None:
    config = trained.config
    folder = Path(config.logging.output_dir)
    if skips.total:
        log(f"skipped   {skips.total} steps whose numbers were not finite, see {folder / 'metrics.jsonl'}")
    log(f"result    {result}{f', its average in {folder}/ema' if config.train.ema_decay else ''}")
    if sampled:
        log(f"samples   {folder / 'samples'}")
    log(f"metrics   {folder / 'metrics.jsonl'}, checkpoints in {folder / 'checkpoints'}")
    images, how = " --image IMAGE" * trained.family.controls[0], f"--steps {config.sample.steps}"
    if not images:  # else the image's own size decides; the stock pipeline's may be far from what was trained
        sizes = table_of(samples)["target"]
        middle = sizes[np.argsort(sizes.prod(axis=1), kind="stable")[len(sizes) // 2]]
        how = f"--size {Size(*middle.tolist())} {how}"
    log(f"next      mixres sample --lora {folder}{images} --prompt TEXT {how} --out FOLDER")
