"""The verb `inspect`: what a run would do, from scan and plan alone, before anything is encoded or trained.

Promise: token totals, steps, microbatches and padding are exactly those that the run will have. Every problem of data
and configuration is reported, and so is what can be used. Cost: the scan, the tokenizer once a record, planning (at
most `MAX_STEPS` steps), and seconds of counting memory; no weights but with `measure` (the transformer) and `decode`
(the VAE).
"""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mixres import atomic
from mixres.config.schema import Config
from mixres.console import log
from mixres.data.plan import Plan, computed_tokens
from mixres.data.scan import is_there
from mixres.errors import Problems, UserError, WorkError
from mixres.inspection import memory_probe
from mixres.inspection.buckets import bucketing
from mixres.inspection.fitting import rehearsed
from mixres.inspection.future_cache import FutureCache
from mixres.inspection.input_preview import chosen, decoded_of, preview_grid
from mixres.inspection.memory import MemoryEstimate
from mixres.inspection.report import Thumbnails, page, summary_lines
from mixres.inspection.statistics import Figures, item_figures, notices, plan_sums, size_figures, token_figures
from mixres.inspection.thumbnails import of_extremes, of_problems
from mixres.models.family import Family
from mixres.models.quantize import is_torchao
from mixres.preprocessing.cache_folder import cache_folder, make_folder
from mixres.preprocessing.encode import text_problems
from mixres.preprocessing.fill import family_of
from mixres.preprocessing.samples import lengths_of
from mixres.preprocessing.training_data import ScannedData, image_limits, scan_records, tell
from mixres.training.checkpoint import Checkpoints
from mixres.training.distributed import dist_env
from mixres.training.resume import checkpoint_to_resume
from mixres.training.sample_sheets import save_png
from mixres.training.setup import check_early, make_plan, run_identity
from mixres.verification.setup import precision_label, report_path, versions
from mixres.verification.synthetic import largest_microbatch

MAX_STEPS = 20_000  # that are planned for the sums over a run


def inspect(
    config: Config,
    *,
    ranks: int = 1,
    measure: bool = False,
    decode: bool = False,
    rehearse: bool = False,
    device_memory: int | None = None,
) -> None:
    """Report on data and plan for `ranks` processes in `inspect.json`, `inspect.html` and `inputs.png`.

    `measure` computes the largest microbatch on the device; `decode` shows what the cache holds beside the images.
    `rehearse` runs it on tensors without values, where there is no data yet as large as the configuration allows, and
    says what to change so that it fits `device_memory` bytes.

    Raises:
        UserError: everything that would keep the run from training; the reports of what is usable are written.
        WorkError: the largest microbatch does not fit the device; the reports are written.
    """
    if device_memory and not rehearse:
        raise UserError("--device-memory: is for --rehearse: add it, or leave this out")
    if (started := dist_env().world_size) > 1:
        raise UserError(f"inspect: works on one process, {started} were started: python train.py inspect --ranks N")
    if ranks < 1:
        raise UserError(f"--ranks: given {ranks}, allowed: an integer >= 1")
    family, problems = family_of(config), Problems()
    foresee = partial(rehearsed, ranks=ranks, device_memory=device_memory)
    if rehearse and not any(map(is_there, config.data.train)):
        _rehearse_without_data(config, family, foresee)
        return
    problems.collect(check_early, config if measure else _checkable_here(config), family)
    estimate = not problems.lines
    make_folder(cache_folder(config))
    found = problems.collect(scan_records, config, family, is_main=True)
    if found is None:
        raise UserError(problems.lines)
    problems.collect(_check_resume, config, family)
    tell(found.summary, family, config.data.background)
    problems.add(*found.refusals(config))
    run = _DryRun(config, family, found, ranks, problems, estimate=estimate)
    report = run.report()
    if measure and not problems.lines:
        report["measured"] = run.measured()
    if rehearse and run.plan and run.memory:
        report["rehearsal"] = foresee(config, family, run.largest, microbatches=run.microbatches)
    _write(config, family, found, report, decode=decode)
    problems.raise_if_any()
    if report["measured"] and not report["measured"]["fits"]:
        raise WorkError(
            f"the largest microbatch does not fit {report['measured']['device']}: lower batch.max_tokens, set "
            "train.gradient_checkpointing=true, or lower data.resize.target.max_pixels"
        )


def _rehearse_without_data(config: Config, family: Family, foresee: Callable[..., Figures]) -> None:
    check_early(_checkable_here(config), family)
    log(f"data      none at {', '.join(config.data.train)}: the largest sizes that the configuration allows")
    report = {"rehearsal": foresee(config, family, largest_microbatch(config, family)), "notices": []}
    for line in summary_lines(report):
        log(line)
    atomic.write_json(report_path(config, "inspect.json"), report)


def _check_resume(config: Config, family: Family) -> None:
    """Whether a run may resume from what its folder holds, but for the data, whose keys need the base's weights."""
    unknown = ("data.train", "data.regularization")
    checkpoints = Checkpoints(Path(config.logging.output_dir) / "checkpoints", keep=config.checkpoint.keep)
    allowed = (*config.resume_allow_changes, *unknown)
    checkpoint_to_resume(checkpoints, config.resume, run_identity(config, family, (), ()), allowed, family.lora_presets)


def _checkable_here(config: Config) -> Config:
    """Without what is planned for CUDA: that this machine has none keeps nobody from planning."""
    quantize = None if _planned_for_cuda(config) else config.model.quantize
    model = config.model.model_copy(update={"quantize": quantize})
    text_device = config.cache.text_device if dist_env().device.type == "cuda" else None
    cache = config.cache.model_copy(update={"text_device": text_device})
    return config.model_copy(update={"model": model, "cache": cache})


def _planned_for_cuda(config: Config) -> bool:
    method = config.model.quantize
    return method is not None and not is_torchao(method) and dist_env().device.type != "cuda"


class _DryRun:
    """The usable records of a configuration, and the plan of those among them that fit a microbatch."""

    def __init__(
        self, config: Config, family: Family, found: ScannedData, ranks: int, problems: Problems, *, estimate: bool
    ) -> None:
        self.config, self.family, self.found, self.ranks, self.problems = config, family, found, ranks, problems
        self.cache = FutureCache(config, family, found)
        self.entries = [self.cache.entries[key] for key in self.cache.train]
        train = self.cache.train
        problems.add(*text_problems(family, self.cache.records, self.cache.entries))
        self.memory = MemoryEstimate(config, family, ranks=ranks) if estimate else None
        planned = list(range(len(train)))
        self.plan = self._planned(planned)
        if self.plan is None:
            planned = [i for i in planned if lengths_of(self.entries[i]).most <= config.batch.max_tokens]
            self.plan = self._planned(planned) if planned else None
        if self.plan:
            valid = [lengths_of(self.entries[i]) for i in planned]
            self.steps = {"epoch": self.plan.steps_per_epoch, "run": config.train.max_train_steps}
            self.sums = {name: plan_sums(self.plan, valid, min(n, MAX_STEPS)) for name, n in self.steps.items()}
            largest = self.sums["run"].largest
            self.lengths = self.plan.lengths_in(largest)
            grids = [self.entries[planned[i]].img_shapes for i in largest.indices]
            self.microbatches = max(len(rank) for rank in self.plan.step(0).ranks)
            self.largest = [(own, length.text) for own, length in zip(grids, self.lengths, strict=True)]

    def _planned(self, indices: Sequence[int]) -> Plan | None:
        config, lengths = self.config, [lengths_of(self.entries[i]) for i in indices]
        names = [self.found.train[i].record.name for i in indices]
        layout = config.batch.layout
        return self.problems.collect(make_plan, config, lengths, names, layout=layout, world_size=self.ranks)

    def report(self) -> Figures:
        """Everything that `inspect.json` holds; `measured` and the input preview come later."""
        config, found = self.config, self.found
        report: Figures = {
            "model": self._model_figures(),
            "faults": self.problems.lines,
            "left_out": [] if found.stop(config) else [str(problem) for problem in found.problems],
            "notices": [],
            "items": item_figures(found),
        }
        if self.entries:
            report["sizes"] = size_figures(found.train, self.entries, self.family.pixels_per_token())
            report["tokens"] = token_figures(found.train, self.entries)
            report["bucketing"] = bucketing(
                [scanned.target_size for scanned in found.train],
                samples_per_step=config.batch.samples_per_step,
                max_pixels=config.data.resize.target.max_pixels,
            )
        free = shutil.disk_usage(cache_folder(config)).free
        report["cache"] = {**self.cache.figures(), "free_bytes": free}
        if self.plan:
            report["notices"] = notices(config, found, report["sizes"], self.sums["epoch"].figures, self.ranks)
            report["plan"] = self._plan_figures(self.plan)
            report["memory"] = self.memory.figures(self.largest) if self.memory else None
        if _planned_for_cuda(config):
            report["notices"].append(
                f"model.quantize={config.model.quantize} needs a CUDA device, this machine has none: it is planned only"
            )
        return report | {"measured": None}

    def _model_figures(self) -> Figures:
        memory = self.memory
        return {
            "base": self.config.model.pretrained_model_name_or_path,
            "family": self.family.name,
            "precision": precision_label(self.config),
            **({"trained_parameters": memory.trained, "parameters": memory.parameters} if memory else {}),
            **versions(),
        }

    def _plan_figures(self, plan: Plan) -> Figures:
        loads = enumerate(zip(*(sums.rank_tokens for sums in self.sums.values()), strict=True))
        return {
            "layout": plan.layout,
            "samples_per_step": plan.samples_per_step,
            "max_tokens": plan.max_tokens,
            "ranks": plan.world_size,
            "examples": len(plan.lengths),
            "steps_per_epoch": plan.steps_per_epoch,
            "max_train_steps": self.steps["run"],
            "epochs": self.steps["run"] / plan.steps_per_epoch,
            "sums": {name: sums.figures for name, sums in self.sums.items()},
            "tokens_of_rank": [{"rank": rank, "epoch": epoch, "run": run} for rank, (epoch, run) in loads],
            "largest_microbatch": {
                "samples": len(self.lengths),
                "image_tokens": sum(length.image for length in self.lengths),
                "text_tokens": sum(length.text for length in self.lengths),
                "tokens_computed": computed_tokens(self.lengths, plan.layout),
            },
        }

    def measured(self) -> Figures:
        """The largest microbatch, computed; and how long epoch and run take at its rate."""
        figures = memory_probe.measure(self.config, self.family, self.largest)
        if figures["fits"]:
            a_token = figures["seconds"] / computed_tokens(self.lengths, self.config.batch.layout)
            for name, sums in self.sums.items():
                tokens_per_step = sums.figures["heaviest_tokens"] / sums.figures["steps"]
                figures[f"{name}_seconds"] = a_token * tokens_per_step * self.steps[name]
        return figures


def _thumbnails(config: Config, found: ScannedData, report: Figures) -> Thumbnails:
    limits, extremes = image_limits(config), report.get("tokens", {}).get("extremes", ())
    faulty = "faults" if found.stop(config) else "left_out"
    return {
        "tokens": of_extremes(extremes, found.train, limits),
        faulty: of_problems(found.problems, limits),
    }


def _write(config: Config, family: Family, found: ScannedData, report: Figures, *, decode: bool) -> None:
    paths = [report_path(config, name) for name in ("inspect.json", "inspect.html", "inputs.png")]
    preview = None
    if some := chosen(found.train):
        decoded = decoded_of(config, family, some, report["notices"].append) if decode else ()
        save_png(preview_grid(config, family, some, decoded), paths[2], [scanned.record.prompt for scanned in some])
        preview = paths[2].read_bytes()
        report["inputs"] = [{"name": scanned.record.name, "caption": scanned.record.prompt} for scanned in some]
    else:
        paths.pop().unlink(missing_ok=True)  # an earlier report's
    for line in summary_lines(report):
        log(line)
    atomic.write_json(paths[0], report)
    atomic.write_text(paths[1], page(report, preview, _thumbnails(config, found, report)))
    log(f"report    {', '.join(map(str, paths))}")
