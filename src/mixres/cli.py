"""The command line: `train.py [VERB] --config FILE [key=value ...]`, verbs with options of their own, and exit codes.

Promise: `--help` needs no library beside Python's own; wrong input is reported in full, one line a problem, before
torch is imported.
"""

import argparse
import contextlib
import errno
import io
import itertools
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mixres import __version__
from mixres.errors import Problems, Stopped, UserError, WorkError, did_you_mean

if TYPE_CHECKING:
    from mixres.config.schema import Config

EXIT_CODES = (
    "exit codes: 0 done, 1 failed at work, 2 wrong input (all problems are listed), 75 stopped by a signal after saving"
    " (run the same command to resume), 130 or 143 interrupted"
)
WITH_CONFIG = {  # the verbs that take a configuration, and what does their work
    "train": "mixres.training.trainer:train",
    "cache": "mixres.cli:_cache",
    "inspect": "mixres.inspection.inspect:inspect",
    "verify": "mixres.verification.verify:verify",
    "bench": "mixres.cli:_bench",
    "quickstart": "mixres.quickstart.results:show_results",
}
# Before a verb, the word after one of these is its value.
_VALUED = ("--config", "--ranks", "--way", "--steps", "--seconds", "--peak-tflops", "--device-memory", "--against",
           "--seeds")  # fmt: skip
# Torch's settings of the allocator on CUDA, the older name last.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# They warn at every import of what is of no account here: kernels for other devices, torchvision.
CHATTY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer",
          "transformers.utils.import_utils")  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


class _Once(argparse.Action):
    def __call__(self, parser: Any, given: argparse.Namespace, value: Any, option: str | None = None) -> None:
        if getattr(given, self.dest) is not None:
            raise UserError(f"{option}: given twice: leave one of the two out")
        setattr(given, self.dest, value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an exception that is a bug comes out as it is."""
    _prepare_output()
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _ended(2, *(f"error: {message}" for message in error.messages))
    except WorkError as error:
        return _ended(1, f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _ended(1, f"error: {error.filename or 'a file'}: cannot be written: {error.strerror}; make room")
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).partition("\n")[0].strip().removesuffix(".")
        return _ended(1, f"error: data.num_workers: {reason}. Where memory is short, lower it")
    except Stopped as stop:
        return _ended(Stopped.exit_code, str(stop))
    except KeyboardInterrupt:
        return _ended(130, "interrupted")
    return 0


def _prepare_output() -> None:
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a console may not have the characters of a prompt


def _ended(code: int, *lines: str) -> int:
    for line in lines:
        print(f"mixres: {line}", file=sys.stderr)
    return code


def parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the whole command, for its help, and one for each verb."""
    name = Path(sys.argv[0]).name.replace("__main__.py", "mixres")
    whole = _Parser(
        prog=name,
        usage=f"{name} [VERB] --config FILE [key=value ...]\n       {name} sample --lora RUN --out DIR [options]\n"
        f"       {name} export RUN --format NAME --out FILE [options]\n       {name} report RUN [--serve]\n"
        f"       {name} quickstart | init NAME",
        description="mixres: train diffusion transformers on images of their native, mixed resolutions.",
        epilog=EXIT_CODES,
    )
    whole.add_argument("--version", action="version", version=f"mixres {__version__}")
    verbs = whole.add_subparsers(title="verbs (VERB --help names the options of one)", metavar="VERB", prog=name)

    def add(verb: str, meaning: str) -> _Parser:
        parser = verbs.add_parser(verb, help=meaning, description=meaning, epilog=EXIT_CODES, allow_abbrev=False)
        if verb in WITH_CONFIG:
            parser.add_argument("words", nargs="*", metavar="key=value", help="overrides of the file's keys")
            parser.add_argument("--config", metavar="FILE", help="a YAML file, or the name of a recipe, see init")
        return parser

    add("train", "fill the cache where it is not full, then train (also where no verb is given)")
    cache = add("cache", "encode every sample of the configuration into the cache (also spelled --cache)")
    instead = cache.add_mutually_exclusive_group()
    instead.add_argument("--verify", action="store_true", help="read and check every entry, remove what is damaged")
    instead.add_argument("--compact", action="store_true", help="move files and small shards into full shards")
    share = "only this part of the entries, such as 3/16, for jobs of an array that do not know each other"
    instead.add_argument("--shard", metavar="I/N", type=_part, help=share)
    cache.add_argument("--device", metavar="NAME", help="cuda, cuda:1, cpu (cuda if there is one)", action=_Once)
    inspect = add("inspect", "show problems, sizes, tokens, plan and memory of a run before it starts")
    inspect.add_argument("--measure", action="store_true", help="compute the largest microbatch")
    inspect.add_argument("--decode", action="store_true", help="also show what the cache holds")
    inspect.add_argument("--ranks", metavar="N", type=int, help="plan for N processes (1)")
    inspect.add_argument("--rehearse", action="store_true", help="one step of one rank on tensors without values")
    fits = "with --rehearse: what to change so that it fits, such as 24GB"
    inspect.add_argument("--device-memory", metavar="SIZE", type=_bytes, help=fits)
    verify = add("verify", "compare a batch of different sizes with its samples alone, on this model, data and device")
    bench = add("bench", "time the ways to batch the same samples")
    for parser in (verify, bench):
        parser.add_argument("--synthetic", action="store_true", help="no weights, no data, no download")
    ways = ("one_by_one", "padded", "packed")
    bench.add_argument("--way", action="append", choices=ways, help="only this one (several may be given)")
    bench.add_argument("--steps", metavar="N", type=int, help="steps of the plan to time (4), or to train (40)")
    bench.add_argument("--seconds", metavar="N", type=float, help="rounds for so long (120, and three at least)")
    bench.add_argument("--peak-tflops", metavar="N", type=float, help="of the device in bf16, for MFU (by its name)")
    against = "train with mixed batches, with buckets as three trainers make them, and one by one"
    bench.add_argument("--against", choices=("buckets",), help=against)
    bench.add_argument("--seeds", metavar="N", type=int, help="with --against: runs of each (1)")
    quickstart = add("quickstart", "train a LoRA on a tiny base: data, training, results; or one of the first and last")
    quickstart.usage = (
        f"{name} quickstart [key=value ...]      data, training and results, in build/quickstart\n"
        f"       {name} quickstart DIR                  the data alone, in DIR\n"
        f"       {name} quickstart --config FILE [...]  the results of a run"
    )
    _add_sample_options(add("sample", "make images with what a run has trained"))
    _add_export_options(add("export", "write what a run has trained for other programs"))
    watch = add("report", "write one page that shows a run, whatever state it is in")
    watch.add_argument("run", metavar="RUN", nargs="?", help="a run folder")
    watch.add_argument("--serve", action="store_true", help="show it on 127.0.0.1 instead, fresh until Ctrl-C")
    watch.add_argument("--port", metavar="N", type=int, help="with --serve: 0 is any that is free (8765)", action=_Once)
    init = add("init", "write a recipe, to be filled in, into the working directory; without NAME list them")
    init.add_argument("name", metavar="NAME", nargs="?", help="such as qwen_image_edit_lora")
    init.add_argument("--out", metavar="FILE", help="another file than NAME.yaml", action=_Once)
    return whole, verbs.choices


def _part(text: str) -> tuple[int, int]:
    """The I-th of N parts."""
    written = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    number, count = (int(written[1]), int(written[2])) if written else (0, 0)
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"{text!r} is no part: write I/N, I from 1 to N, such as 1/16")
    return number, count


def _bytes(text: str) -> int:
    """Of a device's memory: a number of GB (10^9) or GiB (2^30)."""
    written = re.fullmatch(r"(\d+(?:\.\d+)?)(GB|GiB)", text)
    size = int(float(written[1]) * {"GB": 10**9, "GiB": 2**30}[written[2]]) if written else 0
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 24GB or 24GiB")
    return size


def _add_sample_options(parser: _Parser) -> None:
    option = partial(parser.add_argument, action=_Once)
    option("--lora", metavar="RUN|FILE", help="what was trained: a run folder, its ema/, or a .safetensors file")
    parser.add_argument("--image", metavar="FILE", action="append", help="an image to edit; once for each, in order")
    option("--prompt", metavar="TEXT", help="the prompt")
    option("--prompts", metavar="FILE", help="instead of both: JSON lines with prompt, path_control, ..., seed, size")
    option("--out", metavar="DIR", help="the folder for the images; their numbers follow those that are there")
    option("--size", metavar="WxH", help="pixels (as training would make of the first image)")
    option("--batch-tokens", metavar="N", type=int, help="at most so many tokens at once (32768), or one image")
    parser.add_argument("--restore-size", action="store_true", help="scale each image to the size of its first image")
    option("--steps", metavar="N", type=int, help="denoising steps (20)")
    option("--seed", metavar="N", type=int, help="seed of the noise (0)")
    option("--guidance", metavar="G", type=float, help="the stock pipeline's guidance (none, or what the base embeds)")
    option("--negative-prompt", metavar="TEXT", help="what guidance leads away from (the stock pipeline's)")
    parser.add_argument("--compare", action="store_true", help="also without what was trained, both side by side")
    option("--base", metavar="PATH", help="the base, if it has moved since the run")
    option("--device", metavar="NAME", help="cuda, cuda:1, cpu (cuda if there is one)")
    offload = "diffusers' model CPU offload: transformer and VAE are on the device in turn, else in host memory"
    parser.add_argument("--offload", action="store_true", help=offload)
    option("--dtype", metavar="NAME", help="bfloat16 or float32 (float32 on a CPU)")
    option("--quantize", metavar="NAME", help="null, int8, fp8, nf4 or bnb_int8: the base under a LoRA (as trained)")


def _add_export_options(parser: _Parser) -> None:
    option = partial(parser.add_argument, action=_Once)
    run = "what was trained: a run folder, its ema/, one of its checkpoints/, a .safetensors file"
    parser.add_argument("run", metavar="RUN|FILE", nargs="?", help=run)
    option("--format", metavar="NAME", help="diffusers, comfyui, or lycoris of a LoKr or LoHa: whose names it has")
    parser.add_argument("--merge", action="store_true", help="the base's weights with the LoRA in them, not the LoRA")
    option("--out", metavar="FILE", help="a .safetensors file; a folder for diffusers with --merge, and with --card")
    option("--base", metavar="PATH", help="to merge: the base, if it has moved; with --card: its name on the Hub")
    parser.add_argument("--card", action="store_true", help="a folder for the Hub: the LoRA with a model card")
    option("--license", metavar="ID", help="with --card: what you publish it under, such as apache-2.0")
    option("--license-link", metavar="URL", help="with --card: the text of a licence that the Hub has no name for")
    parser.add_argument(
        "--trigger", metavar="TEXT", action="append", help="with --card: a prompt to try; may be repeated"
    )
    option("--push", metavar="ORG/NAME", help="with --card: upload the folder to the Hub, with your own login")
    parser.add_argument("--private", action="store_true", help="with --push: a private repository")


def _run(argv: Sequence[str]) -> None:
    whole, known = parsers()
    positional = [word for before, word in itertools.pairwise(("", *argv)) if before not in _VALUED and word[:1] != "-"]
    verb, words, problems = "train", list(argv), []
    if positional and not {"=", "."} & set(positional[0]):
        verb = positional[0]
        words.remove(verb)
    elif asked := [word for word in words if word in ("-h", "--help", "--version")]:
        whole.parse_args(asked)
    if not argv:
        whole.print_help(sys.stderr)
    if verb not in known:
        hint = did_you_mean(verb, known) or f"; the verbs are: {', '.join(known)}"
        problems.append(f"{verb}: unknown verb{hint}")
        verb = "train"
    if "--cache" in words and verb in WITH_CONFIG:
        verb, words = "cache", [word for word in words if word != "--cache"]
    given, unknown = known[verb].parse_known_intermixed_args(words)
    problems += [_unknown_option(word, verb, known) for word in unknown]
    options = {name: value for name, value in vars(given).items() if value is not None and value is not False}
    file, words = _config_file(options.pop("config", None)), options.pop("words", [])
    try:
        work = _prepared(verb, file, words, options)
    except UserError as error:
        problems += error.messages
    if problems:
        if file:
            _record_refusal(UserError(problems), verb, Path(file), words)
        raise UserError(problems)
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        # Before torch is imported. Each microbatch has other shapes: fixed segments of memory would fragment.
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
    from mixres.training.run_folder import end_with_launcher

    end_with_launcher()  # before the seconds that torch takes to be imported: a launcher may be killed in them
    work()


def _config_file(given: str | None) -> str | None:
    from mixres.config.recipes import config_file

    return str(config_file(given)) if given else None


def _prepared(verb: str, file: str | None, words: Sequence[str], options: dict[str, Any]) -> Callable[[], None]:
    """What the verb does, once everything that was given has been checked."""
    if verb == "init":
        if "out" in options and "name" not in options:
            raise UserError("--out: names the file of a recipe, and NAME is not given: write it")
        return partial(_init, **options)
    if verb == "report":
        return partial(_call, "mixres.report.page:report", **{**options, "run": _run_to_show(**options)})
    if verb not in WITH_CONFIG:
        where = "sample_request" if verb == "sample" else verb
        make_request = pkgutil.resolve_name(f"mixres.inference.{where}:make_request")
        return partial(_call, f"mixres.inference.{verb}:{verb}", make_request(**options))
    from mixres.config.load import load_config
    from mixres.config.recipes import config_file

    if verb == "quickstart" and not file:
        folders = [word for word in words if "=" not in word]
        if not folders:
            return partial(_quickstart, load_config(config_file("quickstart"), words))
        if len(words) != 1:
            raise UserError("quickstart: write one DIR, a folder for the data, or overrides of its keys, or nothing")
        return partial(_call, "mixres.quickstart.data:write_demo", Path(words[0]))
    if not file:
        raise UserError("--config: not given; write --config FILE, or the name of a recipe: mixres init lists them")

    return partial(_call, WITH_CONFIG[verb], load_config(Path(file), words), **options)


def _run_to_show(run: str | None = None, *, serve: bool = False, port: int | None = None) -> Path:
    problems = Problems()
    if port is not None and not serve:
        problems.add("--port: is for --serve: add it, or leave this out")
    if port is not None and not 0 <= port < 2**16:
        problems.add(f"--port: given {port}, allowed: 0 to 65535")
    if run is None:
        problems.add("report: write RUN, a run folder (logging.output_dir of its configuration)")
    else:
        from mixres.report.run import check_run

        problems.collect(check_run, Path(run))
    problems.raise_if_any()
    return Path(run or "")


def _record_refusal(error: UserError, verb: str, file: Path, words: Sequence[str]) -> None:
    """Launchers hide exit codes: under one, `run_status.json` holds the refusal too, if the run folder is known."""
    from mixres.config.load import read_source
    from mixres.training.run_folder import LAUNCHERS, RunFolder

    logging = read_source(file, words).resolved.get("logging")
    folder = logging.get("output_dir") if isinstance(logging, dict) else None
    launched = any(name in os.environ for name in LAUNCHERS) and os.environ.get("RANK", "0") == "0"
    if launched and isinstance(folder, str):
        with contextlib.suppress(UserError), RunFolder(Path(folder), verb=verb, max_train_steps=0, rank=0, wait_s=0):
            raise error


def _unknown_option(word: str, verb: str, known: dict[str, _Parser]) -> str:
    name, _, value = word.partition("=")
    own = known[verb]._option_string_actions
    if verb not in WITH_CONFIG:
        return f"{word}: unknown option of {verb}; see {verb} --help{did_you_mean(name, own)}"
    if "." in name:
        return f"{name}: unknown option; overrides have no dashes: write {name.lstrip('-')}={value or 'VALUE'}"
    if others := [other for other, parser in known.items() if name in parser._option_string_actions]:
        return f"{name}: is for the verb {' or '.join(others)}, not for {verb}: leave it out"
    return f"{word}: unknown option; see --help{did_you_mean(name, own)}"


def _call(work: str, *given: Any, **options: Any) -> None:
    """`work` is `module:function`, imported only now: for wrong input nothing of torch is. Its lines are printed."""
    for line in pkgutil.resolve_name(work)(*given, **options) or ():
        print(line)


def _quickstart(config: "Config") -> None:
    """The same as `make quickstart`, in one process."""
    _call("mixres.quickstart.data:write_demo", Path("build/quickstart"))
    _call(WITH_CONFIG["train"], config)
    _call(WITH_CONFIG["quickstart"], config)


def _init(name: str | None = None, out: str | None = None) -> None:
    from mixres.config.recipes import recipes

    if name:
        _call("mixres.config.recipes:write_recipe", name, Path(out) if out else None)
    else:
        print(*recipes(), sep="\n")


def _cache(
    config: "Config",
    *,
    verify: bool = False,
    compact: bool = False,
    device: str | None = None,
    shard: tuple[int, int] | None = None,
) -> None:
    from mixres.training.distributed import device_named, dist_env

    rank, world_size, _ = dist_env()
    if compact:
        from mixres.preprocessing.compact_cache import compact_cache

        compact_cache(config, world_size=world_size)
    elif verify:
        from mixres.preprocessing.verify_cache import verify_cache

        verify_cache(config, world_size=world_size)
    else:
        from mixres.preprocessing.fill import run_cache
        from mixres.training.run_folder import StopOnSignal

        with StopOnSignal("stopped by a signal: what was encoded is in the cache; run the same command to go on"):
            run_cache(config, device=device_named(device), rank=rank, world_size=world_size, shard=shard)


def _bench(config: "Config", *, against: str | None = None, **options: Any) -> None:
    other = {"synthetic", "way", "seconds", "peak_tflops"} if against else {"seeds"}
    where = "is not for --against" if against else "is for --against buckets"
    problems = [f"--{name.replace('_', '-')}: {where}: leave it out" for name in options if name in other]
    if problems:
        raise UserError(problems)
    work = "against_buckets:against_buckets" if against else "bench:bench"
    pkgutil.resolve_name(f"mixres.verification.{work}")(config, **options)
