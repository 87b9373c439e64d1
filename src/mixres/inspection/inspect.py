"""The verb `inspect`: what a run would do, from scan and plan alone, before anything is encoded or trained.

Promise: token totals, steps, microbatches and filler are those that the run will have, exactly; every problem of data
and configuration is reported, and what is usable is reported all the same. Cost: the scan, the tokenizer once an
example, planning (at most `MAX_STEPS` steps); no weights but with `measure` (the transformer) and `decode` (the VAE).
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mixres import atomic
from mixres.config.schema import Config
from mixres.console import log
from mixres.data.cache import Cache
from mixres.data.plan import Lengths, Plan, computed_tokens
from mixres.errors import UserError, WorkError
from mixres.inspection import memory_probe
from mixres.inspection.activations import rows_of
from mixres.inspection.buckets import bucketing
from mixres.inspection.input_preview import Decoded, chosen, decoded_of, input_sheet
from mixres.inspection.memory import MemoryEstimate
from mixres.inspection.plan_figures import Totals, totals
from mixres.inspection.report import page, summary_lines
from mixres.inspection.statistics import Figures, item_figures, notices, seen_sizes, size_figures, token_figures
from mixres.models.family import Family
from mixres.preprocessing.encode import entry_bytes, foreseen_entries, text_problems
from mixres.preprocessing.fill import family_of, lengths_of, make_folder
from mixres.preprocessing.training_data import ScannedData, scan_records, tell
from mixres.training.distributed import dist_env
from mixres.training.sample_sheets import save_png
from mixres.training.setup import check_early, make_plan
from mixres.verification.setup import precision_label, report_path, versions

MAX_STEPS = 20_000  # that are planned for the sums over a run


def inspect(config: Config, *, ranks: int = 1, measure: bool = False, decode: bool = False) -> None:
    """Look at the configuration's data and plan for `ranks` processes; write `inspect.json`, `.html` and `inputs.png`.

    `measure` computes the largest microbatch on the device; `decode` shows what the cache holds beside the pictures.

    Raises:
        UserError: everything that would keep the run from training; the reports of what is usable are written.
        WorkError: the largest microbatch does not fit the device; the reports are written.
    """
    _check_ranks(ranks)
    family = family_of(config)
    problems = _early_problems(config, family)
    make_folder(Path(config.cache.cache_dir))
    try:
        found = scan_records(config, family, is_main=True)
    except UserError as error:
        raise UserError([*problems, *error.messages]) from error
    tell(found, family.max_prompt_tokens, config.data.background)
    look = _Look(config, family, found, ranks, estimate=not problems)
    problems += [*map(str, found.problems), found.summary()] if found.stop(config) else []
    problems += [*filter(None, [found.share_problem(config)]), *look.problems]
    report = look.report(problems)
    if measure and look.plan and not problems:
        report["measured"] = look.measured()
    _write(config, family, look, report, decode=decode)
    if problems:
        raise UserError(problems)
    if report["measured"] and not report["measured"]["fits"]:
        raise WorkError(
            f"the largest microbatch does not fit {report['measured']['device']}: lower batch.max_tokens, set "
            "train.gradient_checkpointing=true, or lower data.resize.target.max_pixels"
        )


def _check_ranks(ranks: int) -> None:
    if (started := dist_env().world_size) > 1:
        raise UserError(f"inspect: works on one process, {started} were started: python train.py inspect --ranks N")
    if ranks < 1:
        raise UserError(f"--ranks: given {ranks}, allowed: an integer >= 1")


def _early_problems(config: Config, family: Family) -> list[str]:
    try:
        check_early(config, family)
    except UserError as error:
        return list(error.messages)
    return []


class _Look:
    """A configuration's usable examples, and the plan of those among them that fit a microbatch."""

    def __init__(self, config: Config, family: Family, found: ScannedData, ranks: int, *, estimate: bool) -> None:
        self.config, self.family, self.found, self.ranks = config, family, found, ranks
        self.device = dist_env().device
        everything = {str(i): scanned for i, scanned in enumerate([*found.train, *found.held_out])}
        train = list(everything)[: len(found.train)]
        with_empty = train if config.data.caption_dropout > 0 else []
        self.foreseen = foreseen_entries(config, family, everything, with_empty)
        self.entries = [self.foreseen[key] for key in train]
        self.problems = text_problems(family, everything, self.foreseen)
        planned: Sequence[int] = range(len(self.entries))
        self.plan = self._planned(planned)
        if self.plan is None:
            planned = [i for i, e in enumerate(self.entries) if lengths_of(e).most <= config.batch.max_tokens]
            self.plan = self._planned(planned) if planned else None
        valid = [lengths_of(self.entries[i]) for i in planned]
        cuda = self.device.type == "cuda"
        self.memory = MemoryEstimate(config, family, ranks=ranks, cuda=cuda) if estimate else None
        self.epoch: Totals | None = None
        if self.plan:
            epoch, run = (min(n, MAX_STEPS) for n in (self.plan.steps_per_epoch, config.train.max_train_steps))
            self.epoch, _ = totals(self.plan, valid, range(epoch), self._cost)
            self.run, self.largest = totals(self.plan, valid, range(run), self._cost)

    def _planned(self, indices: Sequence[int]) -> Plan | None:
        lengths = [lengths_of(self.entries[i]) for i in indices]
        names = [self.found.train[i].record.name for i in indices]
        layout = self.config.batch.layout
        try:
            return make_plan(self.config, lengths, names, layout=layout, world_size=self.ranks)
        except UserError as error:
            self.problems += error.messages
            return None

    def _cost(self, lengths: Sequence[Lengths]) -> int:
        """What makes one microbatch larger than another: its activations."""
        layout, checkpointing = self.config.batch.layout, self.config.train.gradient_checkpointing
        if self.memory is None:
            return computed_tokens(lengths, layout)
        return self.memory.activations.peak(rows_of(lengths, layout), checkpointing=checkpointing)

    def report(self, problems: Sequence[str]) -> Figures:
        """Everything that `inspect.json` says, `measured` left out."""
        config, found = self.config, self.found
        left_out = [] if found.stop(config) else [str(problem) for problem in found.problems]
        report: Figures = {
            "model": self._model_figures(),
            "faults": list(problems),
            "left_out": left_out,
            "notices": [],
            "items": item_figures(found),
        }
        if self.entries:
            token = self.family.pixels_per_token()
            report["sizes"] = size_figures(found.train, seen_sizes(self.entries, token))
            report["tokens"] = token_figures(found.train, self.entries)
            report["bucketing"] = asdict(
                bucketing(
                    [scanned.target_size for scanned in found.train],
                    samples_per_step=config.batch.samples_per_step,
                    max_pixels=config.data.resize.target.max_pixels,
                )
            )
        report["cache"] = self._cache_figures()
        if self.epoch:
            report["notices"] = notices(config, found, report["sizes"], self.epoch, self.ranks)
            report["plan"] = self._plan_figures(self.epoch)
            report["memory"] = self._memory_figures() if self.memory else None
        return report | {"measured": None}

    def _model_figures(self) -> Figures:
        model = self.config.model
        counts = (
            {"trained_parameters": self.memory.trained, "parameters": self.memory.parameters} if self.memory else {}
        )
        return {
            "base": model.pretrained_model_name_or_path,
            "family": self.family.name,
            "precision": precision_label(self.config),
            **counts,
            **versions(),
        }

    def _cache_figures(self) -> Figures:
        root = Path(self.config.cache.cache_dir)
        sizes = entry_bytes(self.config, self.family, self.foreseen)
        return {"entries": len(sizes), "bytes": sum(sizes.values()), "free_bytes": shutil.disk_usage(root).free}

    def _plan_figures(self, epoch: Totals) -> Figures:
        config, plan = self.config, self.plan
        assert plan is not None
        sums = {name: asdict(some) for name, some in (("epoch", epoch), ("run", self.run))}
        loads = [some.pop("rank_tokens") for some in sums.values()]
        return {
            "layout": plan.layout,
            "samples_per_step": plan.samples_per_step,
            "max_tokens": plan.max_tokens,
            "ranks": plan.world_size,
            "examples": len(plan.lengths),
            "steps_per_epoch": plan.steps_per_epoch,
            "max_train_steps": config.train.max_train_steps,
            "epochs": config.train.max_train_steps / plan.steps_per_epoch,
            "sums": sums,
            "tokens_of_rank": [{"rank": r, "epoch": a, "run": b} for r, (a, b) in enumerate(zip(*loads, strict=True))],
            "largest_microbatch": self._largest_figures(),
        }

    def _largest_figures(self) -> Figures:
        lengths, layout = self.largest.lengths, self.config.batch.layout
        rows = rows_of(lengths, layout)
        return {
            "samples": len(lengths),
            "image_tokens": sum(length.image for length in lengths),
            "text_tokens": sum(length.text for length in lengths),
            "tokens_computed": rows.image + rows.text,
        }

    def _memory_figures(self) -> Figures:
        assert self.memory is not None
        formula, rows = self.memory.activations, rows_of(self.largest.lengths, self.config.batch.layout)
        return {
            "device": self.device.type,
            "parallel": self.config.train.parallel,
            "gradient_checkpointing": self.config.train.gradient_checkpointing,
            "bytes": asdict(self.memory.memory(rows)),
            "blocks": formula.blocks,
            "bytes_of_an_image_token_in_a_block": max(formula.block(b, "image") for b in range(formula.blocks)),
            "bytes_of_a_text_token_in_a_block": max(formula.block(b, "text") for b in range(formula.blocks)),
        }

    def measured(self) -> Figures:
        """The largest microbatch, computed; and how long epoch and run take at its rate."""
        assert self.plan and self.epoch
        entries = [self.entries[i] for i in self.largest.microbatch.indices]  # all fit: there are no problems
        found = memory_probe.measure(self.config, self.family, entries, self.largest.lengths)
        figures: Figures = asdict(found)
        if found.seconds is None:
            return figures
        a_token = found.seconds / computed_tokens(self.largest.lengths, self.config.batch.layout)
        epoch = a_token * self.epoch.heaviest_tokens * self.plan.steps_per_epoch / self.epoch.steps
        run = a_token * self.run.heaviest_tokens * self.config.train.max_train_steps / self.run.steps
        return figures | {"epoch_seconds": epoch, "run_seconds": run}


def _write(config: Config, family: Family, look: _Look, report: Figures, *, decode: bool) -> None:
    paths = [report_path(config, name) for name in ("inspect.json", "inspect.html", "inputs.png")]
    picture = None
    if some := chosen(look.found.train):
        decoded: Decoded = ()
        if decode:
            cache = Cache(config.cache.cache_dir)
            decoded = decoded_of(config, family, some, cache, look.device, report["notices"].append)
        save_png(input_sheet(config, family, some, decoded), paths[2], [scanned.record.prompt for scanned in some])
        picture = paths[2].read_bytes()
        report["inputs"] = [{"name": scanned.record.name, "caption": scanned.record.prompt} for scanned in some]
    else:
        paths.pop().unlink(missing_ok=True)  # an earlier look's
    for line in summary_lines(report):
        log(line)
    atomic.write_json(paths[0], report)
    atomic.write_text(paths[1], page(report, picture))
    log(f"report    {', '.join(map(str, paths))}")
