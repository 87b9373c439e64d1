"""A control of its target's aspect is on the target's token grid, in training, in the entry's key and in sampling."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from PIL import Image

from mixres.config.load import load_config, load_run_config
from mixres.data.scan import find_records
from mixres.errors import UserError
from mixres.geometry import Size, aligned_controls, control_size, same_aspect, target_size
from mixres.models.qwen.edit import QwenImageEdit
from mixres.models.qwen.edit_plus import QwenImageEditPlus
from support.caching import CONTROLS, Caching
from support.samples import assert_same

ROUNDINGS: list[Callable[[float], int]] = [math.floor, math.ceil, round]
FAMILIES = st.sampled_from([QwenImageEdit(""), QwenImageEditPlus("")])
AREAS = st.sampled_from(["target", 1024 * 1024, 512 * 512])


@st.composite
def sources(draw: st.DrawFn) -> Size:
    """Sides of 64 to 8000 pixels, aspects of 1:8 to 8:1."""
    width = draw(st.integers(64, 8000))
    return Size(width, draw(st.integers(max(64, -(-width // 8)), min(8000, width * 8))))


@given(sources(), st.floats(0.2, 5), st.sampled_from(ROUNDINGS), FAMILIES, AREAS, st.booleans())
def test_equal_aspects_give_equal_grids(
    source: Size, scale: float, rounded: Callable[[float], int], family: QwenImageEdit, area: int, upscale: bool
) -> None:
    """However one file of a pair was made from the other, by a factor and rounding."""
    other = Size(*(max(1, rounded(side * scale)) for side in source))
    rules = family.control_areas(area, None)
    for target_file, control in ((source, other), (other, source)):
        target = target_size(target_file, max_pixels=1024 * 1024, multiple_of=16, upscale=upscale)
        aligned = aligned_controls("auto", target_file, [control])
        assert aligned == (True,)
        sizes = family.control_sizes(target, [control], rules, aligned)
        assert sizes.vae == (target,)
        assert sizes == family.control_sizes(target, [control], rules, aligned), "the same again"


@given(sources(), sources(), FAMILIES, AREAS)
def test_other_aspects_keep_the_rule_of_areas(source: Size, control: Size, family: QwenImageEdit, area: int) -> None:
    rules, target = family.control_areas(area, None), target_size(source, max_pixels=1024 * 1024, multiple_of=16)
    pixels = math.prod(target) if area == "target" else area
    by_area = family.control_sizes(target, [control], rules)
    assert by_area.vae == (control_size(control, area=pixels),)
    for rule in ("auto", "never", "always"):
        aligned = aligned_controls(rule, source, [control])
        sizes = family.control_sizes(target, [control], rules, aligned)
        assert aligned == ({"auto": same_aspect(source, control), "always": True, "never": False}[rule],)
        assert sizes.vae == ((target,) if aligned[0] else by_area.vae)
        if family.name == "qwen_image_edit_plus":
            assert sizes.text == by_area.text, "the text encoder's own area stays"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((4032, 3024), (1024, 768), True),
        ((4032, 3024), (1000, 750), True),
        ((4032, 3024), (1000, 751), True),  # rounded up
        ((4032, 3024), (1000, 752), False),
        ((1920, 1080), (1280, 720), True),
        ((1920, 1080), (1366, 768), True),
        ((1920, 1080), (1920, 1088), False),  # padded to multiples of 16
        ((1920, 1080), (1080, 1920), False),
    ],
)
def test_the_tolerance_is_the_rounding_of_the_files_own_pixels(
    one: tuple[int, int], other: tuple[int, int], same: bool
) -> None:
    assert same_aspect(Size(*one), Size(*other)) is same_aspect(Size(*other), Size(*one)) is same


def test_controls_of_one_sample_are_aligned_each_by_itself() -> None:
    target, controls = Size(1200, 800), [Size(600, 400), Size(400, 400), Size(1500, 1000)]
    assert aligned_controls("auto", target, controls) == (True, False, True)
    assert aligned_controls("always", target, controls) == (True,) * 3
    assert aligned_controls("always", target, controls, False) == (False,) * 3, "the record's own word counts"
    assert aligned_controls("never", target, controls, True) == (True,) * 3


@pytest.mark.slow
def test_entries_change_where_alignment_changes_a_size_and_nowhere_else(caching: Caching) -> None:
    """The trained targets are of 64 x 64 pixels, and so are their controls by area."""
    caching.keep_few()
    never, larger = "data.resize.control.align=never", "data.resize.control.area=9216"
    assert caching() == (0, 3)
    assert caching(never) == (1, 2), "the held-out pair alone has other sizes"
    assert caching(larger, never)[0] == 3
    by_area = caching.samples(larger, never)
    assert all(sample.img_shapes[0] != sample.img_shapes[1] for sample in by_area)
    assert caching(larger)[0] == 3
    assert all(sample.img_shapes[0] == sample.img_shapes[1] for sample in caching.samples(larger))
    with Image.open(caching.first(CONTROLS)) as image:
        image.resize((image.width * 2, image.height * 2 + 40)).save(caching.first(CONTROLS))  # of another aspect
    assert caching(larger) == (1, 2)
    other = caching.samples(larger)[0]
    assert other.img_shapes[0] != other.img_shapes[1]
    assert caching(larger, never) == (0, 3), "auto left it alone"
    assert_same(other, caching.samples(larger, never)[0])
    assert caching(larger, "data.resize.control.align=always") == (1, 2)
    stretched = caching.samples(larger, "data.resize.control.align=always")[0]
    assert stretched.img_shapes[0] == stretched.img_shapes[1]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_record_of_a_manifest_has_the_last_word(caching: Caching, suffix: str) -> None:
    caching.keep_few()
    rows = []
    for target, align in zip(caching.files(), (False, None), strict=True):
        control = caching.data / "train" / CONTROLS / target.name
        paths = {"path_target": target, "path_control": control}
        row = {key: str(path.relative_to(caching.data)) for key, path in paths.items()} | {"prompt": "x"}
        rows.append(row | {"align_control": align})
    manifest = caching.data / f"pairs.{suffix}"
    if suffix == "jsonl":
        manifest.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        lines = [",".join(str(row[key]).replace("None", "") for key in rows[0]) for row in rows]
        manifest.write_text("\n".join([",".join(rows[0]), *lines]))
    assert [record.align_control for record in find_records(str(manifest))[0]] == [False, None]
    first, second = caching.samples(f"data.train={manifest}", "data.resize.control.area=9216")
    assert first.img_shapes[0] != first.img_shapes[1]
    assert second.img_shapes[0] == second.img_shapes[1]


def test_a_word_that_is_no_truth_value_is_a_problem_of_its_row(tmp_path: Path) -> None:
    for value in ("yes", 1, []):
        (tmp_path / "a.jsonl").write_text(json.dumps({"path_target": "a.png", "align_control": value}))
        problems = [problem.reason for problem in find_records(str(tmp_path / "a.jsonl"))[1]]
        assert "'align_control' is neither true nor false; write one of them" in problems


def test_a_run_keeps_the_default_of_its_time(small_run: Path, tmp_path: Path) -> None:
    """A run folder whose file lacks the key is of a version that never aligned."""
    folder = tmp_path / "run"
    words = [f"logging.output_dir={folder}"]

    def rule(*more: str) -> str:
        return load_config(small_run, [*words, *more]).data.resize.control.align

    assert rule() == "auto"
    folder.mkdir()
    for text in ("resize: {control: {area: 4096}}", "resize: {control: {area: 4096, align: never}}"):  # once resumed
        (folder / "config.yaml").write_text(
            f"model: {{pretrained_model_name_or_path: x}}\ndata: {{train: y, {text}}}\n"
        )
        assert rule() == load_run_config(folder).data.resize.control.align == "never"
        assert rule("data.resize.control.align=auto") == rule("resume=never") == "auto"
    (folder / "config.yaml").write_text("data: {train: y, resize: {control: {align: auto}}}\n")
    assert rule() == "auto"
    (folder / "config.yaml").write_text("not a run's")
    assert rule() == "auto"


def test_text_to_image_has_nothing_to_align(caching: Caching, base_of: Callable[..., Path]) -> None:
    from support.family_cases import CASES

    case = CASES["qwen_image"]
    words = [f"model.pretrained_model_name_or_path={base_of(case)}", *case.overrides()]
    with pytest.raises(
        UserError, match=r"^data.resize.control.align: qwen_image takes no control images: leave it out"
    ):
        caching.usable(*words, "data.resize.control.align=never")
