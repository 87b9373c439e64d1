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
from mixres.cli_options import EXIT_CODES, OPTIONS, OPTIONS_OF, OWN_OPTIONS, OWN_VERBS, REPEATED, VERBS
from mixres.errors import Stopped, UserError, WorkError

if TYPE_CHECKING:
    from mixres.config.config import Config

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
    from mixres.config.config import load_config

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
    from mixres.config.config import Config
    from mixres.config.load import read_source
    from mixres.config.problems import defaults
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
    if verify:
        from mixres.preprocessing.verify_cache import verify_cache

        verify_cache(config)
    else:
        from mixres.preprocessing.precompute import run_cache

        run_cache(config)


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
    from mixres.inference.sample import sample
    from mixres.inference.sample_request import make_request

    return partial(sample, make_request(**options))


def _export(**options: Any) -> Callable[[], None]:
    from mixres.inference.export import export
    from mixres.inference.export_request import make_request

    return partial(export, make_request(**options))
