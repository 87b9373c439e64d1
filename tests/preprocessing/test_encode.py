"""Entries: what makes one miss and what does not, what it is made of, and what is known of it before it is encoded."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
import torch
from PIL import Image

from mixres.data.images import Limits, read_image
from mixres.data.scan import scan
from mixres.errors import UserError, WorkError
from mixres.preprocessing.encode import entry_bytes, entry_keys, foreseen_entries
from mixres.preprocessing.fill import encode, encode_all, keyed_records
from mixres.preprocessing.training_data import image_limits
from support.caching import CONTROLS, TARGETS, Caching
from support.family_cases import CASES, EVERY_CASE, FamilyCase, with_family
from support.samples import assert_same, same_bits

ALL, TRAIN, FEW = 13, 10, 3
CPU = torch.device("cpu")


def change_pixel(path: Path) -> None:
    with Image.open(path) as image:
        image.load()
    red, *others = image.getpixel((0, 0))
    image.putpixel((0, 0), (red ^ 1, *others))
    image.save(path)


def add_mask(caching: Caching) -> Path:
    with Image.open(caching.first()) as image:
        mask = Image.new("L", image.size, 255)
    mask.paste(0, (0, 0, mask.width // 2, mask.height // 3))
    path = caching.first().with_name(f"{caching.first().stem}_mask.png")
    mask.save(path)
    return path


CHANGES: dict[str, Callable[[Caching], object]] = {
    "prompt": lambda caching: caching.first(suffix=".txt").write_text("make it greener"),
    "control": lambda caching: change_pixel(caching.first(CONTROLS)),
    "a byte behind a control's pixels": lambda caching: os.truncate(caching.first(CONTROLS), 10**5),
    "held-out target": lambda caching: change_pixel(caching.first(part="held_out")),
    "mask": add_mask,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_makes_its_own_entry_miss(caching: Caching, change: str) -> None:
    assert caching() == (0, ALL)
    CHANGES[change](caching)
    assert caching() == (1, ALL - 1)
    assert caching() == (0, ALL)


@pytest.mark.parametrize(
    ("override", "encoded"),
    [
        ("data.resize.target.max_pixels=1024", FEW),
        ("data.resize.control.area=2048", FEW),
        ("model.dtype=bfloat16", FEW),
        ("data.caption_dropout=0.1", FEW - 1),
    ],
)
def test_a_setting_makes_the_entries_that_depend_on_it_miss(caching: Caching, override: str, encoded: int) -> None:
    caching.keep_few()
    assert caching(override) == (encoded, FEW - encoded)
    assert caching(override) == (0, FEW)
    assert caching() == (0, FEW), "the entries there were are still there"


def test_the_version_of_encoding_is_part_of_every_entry(caching: Caching, monkeypatch: pytest.MonkeyPatch) -> None:
    records = scan([str(caching.data / "train")], limits=Limits()).records
    before = set(entry_keys(*with_family(caching.config()), records))
    monkeypatch.setattr("mixres.preprocessing.encode.ENCODING", -1)  # a release that reads or resizes in another way
    assert len(before) == TRAIN and not before & set(entry_keys(*with_family(caching.config()), records))


def test_the_encoders_are_part_of_every_entry(caching: Caching, copy_of_base: Path) -> None:
    caching.keep_few()
    override = f"model.pretrained_model_name_or_path={copy_of_base}"
    assert caching(override) == (0, FEW), "the contents count, not the folder"
    path = copy_of_base / "vae" / "diffusion_pytorch_model.safetensors"
    before, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as after a copy that keeps times
    assert caching(override) == (FEW, 0)


def test_the_background_makes_the_entries_of_transparent_images_miss_and_no_others(caching: Caching) -> None:
    path, blue = caching.first(CONTROLS), 'data.background="#204060"'
    with Image.open(path) as image:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)
    assert caching() == (1, ALL - 1)
    assert caching('data.background="#ffffff"') == (0, ALL), "it is what white is"
    assert caching(blue) == (1, ALL - 1)
    assert caching(blue) == caching() == (0, ALL)


def test_both_areas_of_edit_plus_are_part_of_an_entry(caching: Caching, base_of: Callable[[Any], Path]) -> None:
    case, keys = CASES["qwen_image_edit_plus"], set[str]()
    words = [f"model.pretrained_model_name_or_path={base_of(case)}", *case.overrides()]
    for other in ("area=12544", "area=12545", "text_area=6401"):
        config = caching.config(*words, f"data.resize.control.{other}")
        keys.update(keyed_records(*with_family(config), is_main=False).keys)
    assert len(keys) == 3 * ALL


def test_what_a_file_stands_for_and_the_order_of_controls_are_part_of_an_entry(caching: Caching) -> None:
    """The same bytes in the same order: as two controls, the other way round, and as control and mask."""
    root, one = caching.data / "train" / TARGETS, caching.first()
    with Image.open(one) as image:
        image.rotate(180).save(root / "other.png")
    roles = [("other.png", "path_control_1", one.name), ("other.png", "path_mask", one.name)]
    roles.append((one.name, "path_control_1", "other.png"))
    lines = [json.dumps({"path_target": one.name, "path_control": a, role: b, "prompt": "x"}) for a, role, b in roles]
    (root / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    records, problems, *_ = scan([str(root / "train.jsonl")], limits=Limits())
    assert problems == [] and records[0].digests == records[1].digests
    assert len(set(entry_keys(*with_family(caching.config()), records))) == 3


def test_names_and_times_are_no_part_of_an_entry(caching: Caching) -> None:
    """Of any kind: spaces, line ends, dashes, other scripts in either form, 255 bytes."""
    prefixes = ["re named ", "-", "line\nend", "图片", "café", normalize("NFD", "café")]
    stems = sorted({path.stem for path in caching.data.rglob("*.txt")})
    renamed = {stem: f"{prefixes[i % 6]}{stem}" for i, stem in enumerate(stems)} | {stems[-1]: "n" * 251}
    for path in list(caching.data.rglob("*.*")):
        path.rename(path.with_name(f"{renamed[path.stem]}{path.suffix}"))
    assert caching() == (0, ALL)
    assert all(sample.record.name.isprintable() for sample in caching.encoded().train)


def test_equal_records_share_an_entry(caching: Caching) -> None:
    for file in caching.pair(caching.first()):
        shutil.copyfile(file, file.with_name(f"copy{file.suffix}"))
    assert caching() == (0, ALL)
    samples = caching.encoded().train
    assert len({sample.key for sample in samples}) == TRAIN
    assert len({sample.record.name for sample in samples}) == len(samples) == TRAIN + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_back_is_what_the_family_encodes(caching: Caching, dtype: str) -> None:
    caching.keep_few()
    mask = add_mask(caching)
    family = with_family(caching.config())[1]
    encoded = caching.encoded(f"model.dtype={dtype}")
    encoders = family.load_encoders(dtype=getattr(torch, dtype), device="cpu")
    for sample in [*encoded.train, *encoded.held_out]:
        record = sample.record
        direct = family.encode(
            encoders,
            name=record.name,
            target=read_image(record.target, Limits()),
            target_size=sample.target_size,
            controls=[read_image(path, Limits()) for path in record.controls],
            prompt=record.prompt,
            mask=Image.open(mask).convert("L") if record.mask else None,
            sizes=sample.control_sizes,
        )
        assert_same(encoded.cache.read(sample.key), direct)
    assert [sample.entry.has_mask for sample in encoded.train] == [True, False]


@pytest.mark.parametrize("kind", ["target", "control", "mask"])
def test_a_file_that_changes_after_the_scan_is_never_stored_under_the_old_key(caching: Caching, kind: str) -> None:
    files = {"mask": add_mask(caching), "target": caching.first(), "control": caching.first(CONTROLS)}
    config, family = with_family(caching.config())
    found = keyed_records(config, family, is_main=False)
    missing = [key for key in found.keys if found.cache.lookup(key) is None]
    assert len(missing) == 1
    with Image.open(files[kind]) as image:
        image.load()
    image.putpixel((0, 0), 7 if image.mode == "L" else (1, 2, 3))
    image.save(files[kind])
    again = "has changed since the scan: run the same command again"
    for reason in (f"{files[kind]} {again}", f"a file {again} (is empty (0 bytes); copy it again)"):
        with pytest.raises(WorkError, match=re.escape(f"{TARGETS}/{files['target'].name}: {reason}")):
            encode(config, family, found, device=CPU)
        files[kind].write_bytes(b"")
    assert found.cache.lookup(missing[0]) is None


FAST = ("qwen_image_edit_plus", "flux2_klein")


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in (*CASES, "flux_kontext") if n not in FAST)]
)
def test_every_family_foresees_its_entries_and_caches_the_empty_prompt(
    name: str, caching: Caching, base_of: Callable[[FamilyCase], Path], pairs_of: Callable[[FamilyCase], Path]
) -> None:
    case = EVERY_CASE[name].in_a_folder()
    caching.data, caching.cache = pairs_of(case), caching.cache / "empty"
    caching.keep_few(train=3)
    words = [f"model.pretrained_model_name_or_path={base_of(case)}", "data.caption_dropout=0.5", *case.overrides()]
    config, family = with_family(caching.config(*words))
    found = keyed_records(config, family, is_main=False)
    parts = found.shared.named_by(found.by_key)
    foreseen = foreseen_entries(config, family, found.by_key, found.with_empty, found.shared, parts)
    encoded = encode_all(config, family, device=CPU)
    stored = {key: encoded.cache.lookup(key) for key in foreseen}
    assert foreseen == stored, "token for token"
    for key, size in entry_bytes(config, family, foreseen).items():
        real = encoded.cache.path(key).stat().st_size
        assert real < size < 1.1 * real + 25_000
    encoders = family.load_encoders(dtype=torch.float32, device="cpu")
    encoders.vae = None  # a prompt needs the text encoder alone
    for sample in encoded.train:
        controls = [read_image(path, image_limits(config)) for path in sample.record.controls]
        empty = family.encode_prompt(encoders, controls=controls, prompt="", sizes=sample.control_sizes)
        cached = encoded.cache.read(sample.key).without_caption().text
        assert torch.equal(cached.tokens, empty.tokens)
        assert same_bits(cached.pooled, empty.pooled) and (empty.pooled is None) == (family.pooled_width() == 0)
        assert 0 < sample.lengths.empty_text == len(empty.tokens)
        assert sample.lengths.text == family.padded_text or sample.lengths.empty_text < sample.lengths.text
    assert all(encoded.cache.read(sample.key).empty_embeds is None for sample in encoded.held_out)


def refused(caching: Caching, *overrides: str) -> dict[str, str]:
    """Why no record is encoded, by its name."""
    with pytest.raises(UserError) as caught:
        caching.encoded(*overrides)
    assert len(list(caching.cache.glob("??/*"))) == ALL
    return {name: reason for name, _, reason in (line.partition(": ") for line in caught.value.messages)}


def test_text_beyond_the_positions_of_the_base_is_refused_before_encoding(caching: Caching, copy_of_base: Path) -> None:
    """The tables of Qwen-Image end at position 4095; text stands behind half the longest side of the images' grids.

    A control of 2048 x 2048 pixels is 128 x 128 image tokens and 73 x 73 text tokens, where the processor permits it.
    """
    file = copy_of_base / "processor" / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["size"]["longest_edge"] = 2**24
    file.write_text(json.dumps(settings))
    for control in (*caching.files(CONTROLS), *caching.files(CONTROLS, "held_out")):
        Image.new("RGB", (32, 32)).save(control)
    words = [f"model.pretrained_model_name_or_path={copy_of_base}", "batch.max_tokens=99999"]
    words.append("data.resize.control.align=never")
    problems = refused(caching, *words, "data.resize.control.area=4194304")
    assert len(problems) == ALL
    for reason in problems.values():
        found = re.match(r"(\d+) text tokens, those of its controls included, are more than the 4032 that", reason)
        assert found and 73 * 73 < int(found[1]) < 73 * 73 + 60, reason


def test_what_is_over_the_budget_is_refused_before_encoding(caching: Caching) -> None:
    lengths = {sample.record.name: sample.lengths.total for sample in caching.encoded().train}
    most = sorted(lengths.values())[-3] - 1
    assert refused(caching, f"batch.max_tokens={most}", "data.caption_dropout=0.1").keys() == {
        name for name, total in lengths.items() if total > most
    }
