"""The recipes that ship with mixres: `configs/` of the repository, which the wheel holds as `mixres/recipes`.

Promise: `--config NAME` and `mixres init NAME` read the same file, with its comments.
"""

from pathlib import Path

from mixres import atomic
from mixres.errors import UserError

_PACKAGE = Path(__file__).parents[1]
_PLACES = (_PACKAGE / "recipes", _PACKAGE.parents[1] / "configs")  # of a wheel, of a clone


def recipes() -> dict[str, Path]:
    """The files by name, such as `quickstart` or `accelerate/multi_gpu`."""
    folder = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return dict(sorted(files.items()))


def recipe(name: str) -> Path:
    """The file of one of them.

    Raises:
        UserError: there is none of that name.
    """
    known = recipes()
    if name not in known:
        raise UserError(f"{name}: no recipe has that name; there are: {', '.join(known)}")
    return known[name]


def config_file(given: str) -> Path:
    """The file that `--config` names: a path, or the name of a recipe where no file has it."""
    path, known = Path(given), recipes()
    return path if path.is_file() or given not in known or "/" in given else known[given]


def write_recipe(name: str, out: Path | None = None) -> list[str]:
    """Write a copy of a recipe to `out`, by default NAME.yaml in the working directory; returns what to do with it.

    Raises:
        UserError: there is no such recipe, or the file exists or cannot be written.
    """
    source = recipe(name)
    out = out or Path(source.name)
    if out.exists():
        raise UserError(f"{out}: exists already: give another name with --out, or move it away")
    try:
        atomic.write_bytes(out, source.read_bytes())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}; name another file") from error
    if name.startswith("accelerate/"):
        return [f"next      accelerate launch --config_file {out} -m mixres --config FILE"]
    data = "" if name == "quickstart" else " data.train=my_pairs"
    first = ["next      mixres quickstart build/quickstart, which writes its data, then"] if not data else []
    steps = [*first, f"next      mixres inspect --config {out}{data}"]
    return [f"recipe    {out}: its comments explain the keys", *steps]
