"""The command line: `train.py [VERB] --config FILE [key=value ...]`, verbs with options of their own, and what each way
of ending means.

Promise: `--help` needs no library beside Python's own; wrong input is told in full, one line a problem, before torch is
imported. Cost: a few milliseconds until a verb runs.
"""

import argparse
import contextlib
import difflib
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mixres import __version__
from mixres.errors import Stopped, UserError, WorkError

if TYPE_CHECKING:
    from mixres.config.schema import Config

# What importing torchao logs wherever it is installed: GPU kernels that this machine has no use for.
CHATTY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


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
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        for message in error.messages:
            print(f"mixres: error: {message}", file=sys.stderr)
        return 2
    except WorkError as error:
        print(f"mixres: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"mixres: error: {error.filename or 'a file'}: cannot be written: {error.strerror}; make room",
            file=sys.stderr,
        )
        return 1
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).partition("\n")[0].strip()
        print(f"mixres: error: data.num_workers: {reason} Where memory is short, lower it", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"mixres: {stop}", file=sys.stderr)
        return Stopped.exit_code
    except KeyboardInterrupt:
        print("mixres: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(words: Sequence[str]) -> None:
    if words and words[0] in OWN_VERBS:
        return _run_own_verb(words[0], words[1:])
    verb, config, options = _parse(words)
    _end_with_launcher()
    run = {"train": _train, "cache": _cache, "inspect": _inspect, "verify": _verify, "bench": _bench}[verb]
    return run(config, **options)


def _parse(argv: Sequence[str]) -> "tuple[str, Config, dict[str, Any]]":
    """The verb, its configuration and its own options, or a UserError with every problem of all that was given."""
    given, unknown = _parser().parse_known_intermixed_args(argv)
    problems = [_unknown_option(option) for option in unknown]
    words: list[str] = given.words
    verb = words.pop(0) if words and not {"=", "."} & set(words[0]) else "train"
    if not argv:
        _parser().print_help(sys.stderr)
    if verb in OWN_VERBS:
        problems.append(f"{verb}: takes no configuration: write it first, then its options, see {verb} --help")
        raise UserError(problems)
    if verb not in VERBS:
        verbs = (*VERBS, *OWN_VERBS)
        problems.append(f"{verb}: unknown verb{_nearest(verb, verbs)}; the verbs are: {', '.join(verbs)}")
    verb = "cache" if given.cache else verb
    values = {option: getattr(given, option) for own in OPTIONS_OF.values() for option in own}
    options = {option: value for option, value in values.items() if value is not None and value is not False}
    problems += [
        f"--{option}: is for the verb {owner}, not for {verb}: leave it out"
        for owner, own in OPTIONS_OF.items()
        for option in own
        if option in options and verb != owner and verb in VERBS
    ]
    if not given.config:
        problems.append("--config: not given; write --config FILE, for example --config configs/quickstart.yaml")
        raise UserError(problems)
    from mixres.config.load import load_config

    try:
        config = load_config(Path(given.config), words)
    except UserError as error:
        problems += error.messages
    if problems:
        _record_refusal(UserError(problems), verb, Path(given.config), words)
        raise UserError(problems)
    return verb, config, options


def _record_refusal(error: UserError, verb: str, file: Path, words: Sequence[str]) -> None:
    """Launchers hide exit codes: under one `run_status.json` says it too, where it can be told whose."""
    from mixres.config.problems import defaults
    from mixres.config.schema import Config
    from mixres.config.source import read_source
    from mixres.training.run_folder import LAUNCHERS, RunFolder

    logging = read_source(file, words, defaults(Config)).resolved.get("logging")
    folder = logging.get("output_dir") if isinstance(logging, dict) else None
    launched = any(name in os.environ for name in LAUNCHERS) and os.environ.get("RANK", "0") == "0"
    if launched and isinstance(folder, str):
        with contextlib.suppress(UserError), RunFolder(Path(folder), verb=verb, max_train_steps=0, rank=0, wait_s=0):
            raise error


def _run_own_verb(verb: str, argv: Sequence[str]) -> None:
    """Check everything that was given, then do it."""
    given, unknown = _own_parser(verb).parse_known_args(argv)
    names = [name for name, _, _ in OWN_OPTIONS[verb]]
    problems = [
        f"{word}: unknown option of {verb}; see {verb} --help{_nearest(word.partition('=')[0], names)}"
        for word in unknown
    ]
    work = None
    try:
        work = {"sample": _sample, "export": _export}[verb](**vars(given))
    except UserError as error:
        problems += error.messages
    if problems or work is None:
        raise UserError(problems)
    work()


def _own_parser(verb: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"{Path(sys.argv[0]).name} {verb}",
        description=OWN_VERBS[verb].partition(" (")[0],
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    for name, value, meaning in OWN_OPTIONS[verb]:
        if value is None:
            parser.add_argument(name, action="store_true", help=meaning)
        elif not name.startswith("-"):
            parser.add_argument(name, metavar=value, nargs="?", help=meaning)
        else:
            action = "append" if name in REPEATED else _Once
            parser.add_argument(name, metavar=value, action=action, help=meaning)
    return parser


def _end_with_launcher() -> None:
    """Before the seconds that torch takes to be imported: a launcher may be killed in them."""
    from mixres.training.run_folder import end_with_launcher

    end_with_launcher()


def _parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:<8}{meaning}" for verb, meaning in {**VERBS, **OWN_VERBS}.items())
    parser = _Parser(
        prog=Path(sys.argv[0]).name,
        usage="%(prog)s [VERB] --config FILE [key=value ...]\n       %(prog)s sample --lora RUN --out DIR [options]\n"
        "       %(prog)s export RUN --format NAME --out FILE [options]",
        description="mixres: train diffusion transformers on images of their native, mixed resolutions.",
        epilog=f"verbs:\n{verbs}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="VERB, key=value", help="a verb, then overrides of the file's keys")
    parser.add_argument("--config", metavar="FILE", help="the YAML configuration, see configs/")
    parser.add_argument("--cache", action="store_true", help="another spelling of the verb `cache`")
    parser.add_argument("--verify", action="store_true", help="for `cache`: read and check every entry, encode nothing")
    parser.add_argument("--synthetic", action="store_true", help="for `bench`: no weights, no data, no download")
    parser.add_argument("--measure", action="store_true", help="for `inspect`: compute the largest microbatch")
    parser.add_argument("--decode", action="store_true", help="for `inspect`: show what the cache holds, too")
    parser.add_argument("--ranks", metavar="N", type=int, help="for `inspect`: plan for so many processes (default 1)")
    parser.add_argument("--version", action="version", version=f"mixres {__version__}")
    return parser


def _unknown_option(word: str) -> str:
    name, _, value = word.partition("=")
    if "." in name:
        return f"{name}: unknown option; overrides have no dashes: write {name.lstrip('-')}={value or 'VALUE'}"
    return f"{word}: unknown option; see --help{_nearest(name, OPTIONS)}"


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


# The verbs import what they need when they run: nothing of torch is loaded for wrong input.


def _train(config: "Config") -> None:
    from mixres.training.trainer import train

    train(config)


def _cache(config: "Config", *, verify: bool = False) -> None:
    from mixres.training.distributed import dist_env

    rank, world_size, device = dist_env()
    if verify:
        from mixres.preprocessing.verify_cache import verify_cache

        verify_cache(config, world_size=world_size)
    else:
        from mixres.preprocessing.fill import run_cache

        run_cache(config, device=device, rank=rank, world_size=world_size)


def _inspect(config: "Config", **options: Any) -> None:
    from mixres.inspection.inspect import inspect

    inspect(config, **options)


def _verify(config: "Config") -> None:
    from mixres.verification.verify import verify

    verify(config)


def _bench(config: "Config", *, synthetic: bool = False) -> None:
    from mixres.verification.bench import bench

    bench(config, synthetic=synthetic)


def _sample(**options: Any) -> Callable[[], None]:
    from mixres.inference.sample import make_request, sample

    return partial(sample, make_request(**options))


def _export(**options: Any) -> Callable[[], None]:
    from mixres.inference.export import export, make_request

    return partial(export, make_request(**options))


VERBS = {
    "train": "fill the cache where it is not full, then train (also where no verb is given)",
    "cache": "encode every sample of the configuration into the cache, then stop (--verify: check the entries there)",
    "inspect": "show problems, sizes, tokens, plan, memory of the run to come, before any of it (--measure, --ranks N)",
    "verify": "compare a batch of different sizes with its samples alone, on this model, data and device",
    "bench": "time the ways to batch the same samples (--synthetic: random weights and samples of this model's shape)",
}
# Verbs with options of their own, which come behind them: name, its value (None: a switch), meaning. All are text here;
# the verb checks them, together with what they name.
OWN_VERBS = {
    "sample": "make pictures with what a run has trained (its options: sample --help)",
    "export": "write what a run has trained for diffusers or ComfyUI (its options: export --help)",
}
REPEATED = ("--image",)
OWN_OPTIONS = {
    "sample": (
        ("--lora", "RUN|FILE", "what was trained: a run folder, its ema/, or a .safetensors file"),
        ("--image", "FILE", "an image to be edited; once for each, in their order"),
        ("--prompt", "TEXT", "what is to be made"),
        ("--prompts", "FILE", "instead of both: JSON lines with prompt, path_control, ..., also seed and size"),
        ("--out", "DIR", "the folder for the pictures; they are numbered on behind those that are there"),
        ("--size", "WxH", "pixels of the pictures (the stock pipeline's: 1024 x 1024 in area, as the last image)"),
        ("--steps", "N", "denoising steps (20)"),
        ("--seed", "N", "seed of the noise (0)"),
        ("--guidance", "G", "strength of guidance, the stock pipelines' true_cfg_scale (1: none)"),
        ("--negative-prompt", "TEXT", "what guidance leads away from (' ')"),
        ("--compare", None, "also without what was trained, and sheets of both side by side"),
        ("--base", "PATH", "the base, where it is no longer where the run had it"),
        ("--device", "NAME", "cuda, cuda:1, cpu (cuda where there is one)"),
        ("--dtype", "NAME", "bfloat16 or float32 (float32 on a CPU)"),
        ("--quantize", "NAME", "null, int8, fp8, nf4 or bnb_int8: the base under a LoRA (as it was trained)"),
    ),
    "export": (
        ("run", "RUN|FILE", "what was trained: a run folder, its ema/, one of its checkpoints/, a .safetensors file"),
        ("--format", "NAME", "diffusers or comfyui: whose names the file is to have"),
        ("--merge", None, "the base's weights with the LoRA in them instead of the LoRA"),
        ("--out", "FILE", "where to, a .safetensors file; a folder for diffusers with --merge"),
        ("--base", "PATH", "to merge: the base, where it is no longer where the run had it"),
    ),
}
OPTIONS_OF = {  # that a verb alone has
    "cache": ("verify",),
    "bench": ("synthetic",),
    "inspect": ("measure", "decode", "ranks"),
}
OPTIONS = ("--config", "--cache", *(f"--{o}" for of in OPTIONS_OF.values() for o in of), "--help", "--version")

EXIT_CODES = (
    "exit codes: 0 done, 1 failed at work, 2 wrong input (all problems are listed), 75 stopped by a signal after saving"
    " (run the same command to go on), 130 or 143 interrupted"
)
