"""The caching pass: what is encoded anew and what is not, what it is made of, and what is told when data are wrong."""

import gc
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from mixres import cli
from mixres.batch import Sample
from mixres.config.load import load_config
from mixres.config.schema import Config
from mixres.data.images import Limits, read_image
from mixres.data.scan import scan
from mixres.errors import UserError, WorkError
from mixres.geometry import Size, control_size, target_size
from mixres.models.qwen.edit import QwenImageEdit
from mixres.preprocessing.encode import entry_keys, entry_sizes, foreseen_entries
from mixres.preprocessing.fill import (
    CachedData,
    encode_all,
    encode_missing,
    family_of,
    keyed_records,
    run_cache,
    spread,
)
from mixres.preprocessing.training_data import control_areas, image_limits
from support.family_cases import CASES, FamilyCase, with_family

ALL, FEW = 13, 3


@pytest.fixture
def data(few_pairs: Path, tmp_path: Path) -> Path:
    """The pairs once more, to be changed."""
    return shutil.copytree(few_pairs, tmp_path / "data")


class Caching:
    """One caching pass after the other over `data`, in a copy of the cache that the session has filled."""

    def __init__(self, file: Path, cache: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file, self.cache, self.data, self.capsys = file, cache, data, capsys

    def config(self, *overrides: str) -> Config:
        common = [
            f"data.train={self.data / 'train'}",
            f"data.held_out={self.data / 'held_out'}",
            f"cache.cache_dir={self.cache}",
            f"logging.output_dir={self.data / 'run'}",
        ]
        return load_config(self.file, [*common, *overrides])

    def __call__(self, *overrides: str) -> tuple[int, int]:
        """How many entries were encoded and found, in the run's own words."""
        run_cache(self.config(*overrides))
        counts = re.search(r"(\d+) encoded, (\d+) found", self.capsys.readouterr().out)
        assert counts
        return int(counts[1]), int(counts[2])

    def encoded(self, *overrides: str) -> CachedData:
        config = self.config(*overrides)
        return encode_all(config, family_of(config), device=torch.device("cpu"))


@pytest.fixture
def caching(
    small_run: Path, filled_cache: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Caching:
    return Caching(small_run, shutil.copytree(filled_cache, tmp_path / "cache"), data, capsys)


def first(data: Path, kind: str, part: str = "train", suffix: str = ".png") -> Path:
    return min((data / part / kind).glob(f"*{suffix}"))


def keep_few(data: Path) -> None:
    """Two training pairs and one held-out pair: encoding in bfloat16 takes a second each on a CPU."""
    for part, count in (("train", 2), ("held_out", 1)):
        for path in sorted((data / part / "training_images").glob("*.png"))[count:]:
            for file in (path, path.with_suffix(".txt"), data / part / "control_images" / path.name):
                file.unlink()


def change_prompt(data: Path) -> None:
    first(data, "training_images", suffix=".txt").write_text("make it greener", encoding="utf-8")


def change_pixel(path: Path) -> None:
    with Image.open(path) as image:
        image.load()
    red, *others = image.getpixel((0, 0))
    image.putpixel((0, 0), (red ^ 1, *others))
    image.save(path)


def change_control(data: Path) -> None:
    change_pixel(first(data, "control_images"))


def change_byte_of_control(data: Path) -> None:
    """A byte behind the picture: the file has changed, no pixel has."""
    with first(data, "control_images").open("ab") as file:
        file.write(b"x")


def change_held_out_target(data: Path) -> None:
    change_pixel(first(data, "training_images", "held_out"))


def add_mask(data: Path) -> None:
    target = first(data, "training_images")
    with Image.open(target) as image:
        Image.new("L", image.size, 255).save(target.with_name(f"{target.stem}_mask.png"))


@pytest.mark.parametrize(
    "change", [change_prompt, change_control, change_byte_of_control, change_held_out_target, add_mask]
)
def test_a_changed_file_makes_its_own_entry_miss(caching: Caching, change: Callable[[Path], None]) -> None:
    assert caching() == (0, ALL)
    change(caching.data)
    assert caching() == (1, ALL - 1)
    assert caching() == (0, ALL)


def test_the_background_makes_the_entries_of_transparent_pictures_miss_and_no_others(caching: Caching) -> None:
    path, blue = first(caching.data, "control_images"), 'data.background="#204060"'
    with Image.open(path) as image:
        seethrough = image.convert("RGBA")
    seethrough.putalpha(Image.linear_gradient("L").resize(seethrough.size))
    seethrough.save(path)
    assert caching() == (1, ALL - 1)
    assert caching('data.background="#ffffff"') == (0, ALL), "it is what white is"
    assert caching(blue) == (1, ALL - 1)
    assert caching(blue) == caching() == (0, ALL)
    ours = caching.encoded(blue).train[0]
    flat = Image.new("RGBA", seethrough.size, "#204060")
    flat.alpha_composite(seethrough)
    flat.convert("RGB").save(path)
    theirs = caching.encoded().train[0]
    assert ours.key != theirs.key
    a, b = (caching.encoded().cache.read(item.key) for item in (ours, theirs))
    assert a.name != b.name and same(a, replace(b, name=a.name))


def test_a_sample_has_one_entry_trained_regularising_or_with_any_weight(caching: Caching) -> None:
    for target in sorted((caching.data / "train/training_images").glob("*.png"))[:FEW]:
        for file in (target, target.with_suffix(".txt"), caching.data / "train/control_images" / target.name):
            moved = caching.data / "regular" / file.parent.name / file.name
            moved.parent.mkdir(parents=True, exist_ok=True)
            file.rename(moved)
    regular = f"data.regularization={caching.data / 'regular'}"
    assert caching(regular) == (0, ALL)
    assert caching(regular, "loss.prior_loss_weight=0.3") == (0, ALL)
    items = caching.encoded(regular).train
    assert [item.regularization for item in items] == [False] * (len(items) - FEW) + [True] * FEW


def test_caption_dropout_encodes_the_training_entries_anew_and_no_others(caching: Caching) -> None:
    assert caching("data.caption_dropout=0.1") == (ALL - FEW, FEW)
    assert caching("data.caption_dropout=0.9") == (0, ALL)
    assert caching() == (0, ALL)  # the entries without the empty prompt are still there
    plain, dropped = caching.encoded(), caching.encoded("data.caption_dropout=0.5")
    assert all(item.lengths.empty_text == 0 for item in (*plain.train, *dropped.held_out))
    texts = set()
    for one, two in zip(plain.train, dropped.train, strict=True):
        here, there = plain.cache.read(one.key), dropped.cache.read(two.key)
        assert there.empty_embeds is not None and here.empty_embeds is None
        assert torch.equal(here.prompt_embeds, there.prompt_embeds)
        assert torch.equal(here.target_latents, there.target_latents)
        assert two.lengths == one.lengths._replace(empty_text=len(there.empty_embeds))
        assert 0 < two.lengths.empty_text < two.lengths.text
        texts.add(there.empty_embeds[-8:].sum().item())
    assert len(texts) > 1  # it sees the sample's own control image


def test_the_empty_prompt_is_what_encoding_an_empty_caption_gives(caching: Caching) -> None:
    """And that is bit for bit what the stock pipeline makes of it, see the tests of the family."""
    keep_few(caching.data)
    stored = caching.encoded("data.caption_dropout=0.1")
    for caption in (caching.data / "train" / "training_images").glob("*.txt"):
        caption.write_text("", encoding="utf-8")
    empty = caching.encoded("data.empty_caption=use_empty")
    for one, two in zip(stored.train, empty.train, strict=True):
        found = stored.cache.read(one.key).empty_embeds
        assert found is not None and torch.equal(found, empty.cache.read(two.key).prompt_embeds)


def test_the_version_of_encoding_is_part_of_every_entry(caching: Caching, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_few(caching.data)
    monkeypatch.setattr(
        "mixres.preprocessing.encode.ENCODING", -1
    )  # as in a release that reads or resizes in another way
    assert caching() == (FEW, 0)


def test_what_a_file_stands_for_and_the_order_of_controls_are_part_of_an_entry(caching: Caching) -> None:
    """The same bytes in the same order: as two controls, the other way round, and as control and mask."""
    root = caching.data / "train" / "training_images"
    one = first(caching.data, "training_images")
    with Image.open(one) as image:
        image.rotate(180).save(root / "other.png")
    row = {"path_target": one.name, "path_control": "other.png", "prompt": "make it blue"}
    rows = [row | {"path_control_1": one.name}, row | {"path_mask": one.name}]
    rows.append(row | {"path_control": one.name, "path_control_1": "other.png"})
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    records, problems, *_ = scan([str(root / "train.jsonl")], limits=Limits())
    assert problems == []
    assert records[0].digests == records[1].digests
    assert len(set(entry_keys(*with_family(caching.config()), records))) == 3


TURNED = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 5: Image.Transpose.TRANSPOSE}


def test_a_picture_turned_by_exif_makes_the_entry_of_the_upright_one(caching: Caching) -> None:
    add_mask(caching.data)
    target = first(caching.data, "training_images")
    mask = target.with_name(f"{target.stem}_mask.png")
    with Image.open(mask) as image:
        half = image.copy()
    half.paste(0, (0, 0, half.width // 2, half.height // 3))
    half.save(mask)
    upright = caching.encoded()
    for path, (orientation, stored) in zip(
        (target, mask, first(caching.data, "control_images")), TURNED.items(), strict=True
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        with Image.open(path) as image:
            turned = image.transpose(stored)
        turned.save(path, exif=exif)
    turned_too = caching.encoded()
    assert caching.capsys.readouterr().out.count("1 encoded, 12 found") == 2
    one, two = upright.train[0], turned_too.train[0]
    assert one.key != two.key
    assert same(upright.cache.read(one.key, "x"), turned_too.cache.read(two.key, "x"))


def test_names_and_times_are_no_part_of_an_entry(caching: Caching) -> None:
    """Of any kind: spaces, line ends, dashes, other scripts in either form, 255 bytes."""
    prefixes = ["re named ", "-", "line\nend", "图片", "café", normalize("NFD", "café")]
    stems = sorted({path.stem for path in caching.data.rglob("*.txt")})
    assert len(stems) == ALL
    renamed = {stem: f"{prefixes[i % 6]}{stem}" for i, stem in enumerate(stems)} | {stems[-1]: "n" * 251}
    for path in list(caching.data.rglob("*.*")):
        path.rename(path.with_name(f"{renamed[path.stem]}{path.suffix}"))
    assert caching() == (0, ALL)
    change_prompt(caching.data)
    assert caching() == (1, ALL - 1)
    assert all(item.record.name.isprintable() for item in caching.encoded().train)


def test_equal_examples_share_an_entry(caching: Caching) -> None:
    for path in list(caching.data.rglob("*000_*")):
        shutil.copyfile(path, path.with_name(f"copy{path.suffix}"))
    assert caching() == (0, ALL)
    items = caching.encoded().train
    assert len(items) == 11
    assert len({item.key for item in items}) == 10
    assert len({item.record.name for item in items}) == 11


def test_a_size_rule_makes_only_the_sizes_it_changes_miss(caching: Caching) -> None:
    stock = caching.encoded()
    before = {item.key for item in stock.train + stock.held_out}
    other = caching.encoded("data.resize.target.max_pixels=10000")
    changed = 0
    for part in ("train", "held_out"):
        for path in (caching.data / part / "training_images").glob("*.png"):
            with Image.open(path) as image:
                sizes = {
                    target_size(Size(*image.size), max_pixels=limit, multiple_of=16, upscale=False)
                    for limit in (16384, 10000)
                }
            changed += len(sizes) == 2
    assert 0 < changed < ALL
    assert len({item.key for item in other.train + other.held_out} - before) == changed
    assert f"{changed} encoded, {ALL - changed} found" in caching.capsys.readouterr().out


def test_one_prompt_and_two_controls_are_two_embeddings(caching: Caching) -> None:
    """The text encoder sees the control: a cache keyed by words would hand one embedding to both."""
    keep_few(caching.data)
    target = first(caching.data, "training_images")
    other = sorted((caching.data / "train" / "control_images").glob("*.png"))[1]
    for path, copy in ((target, "training_images"), (other, "control_images")):
        shutil.copyfile(path, caching.data / "train" / copy / "copy.png")
    shutil.copyfile(target.with_suffix(".txt"), caching.data / "train" / "training_images" / "copy.txt")
    encoded = caching.encoded()
    by_name = {Path(item.record.name).stem: item for item in encoded.train}
    one, two = (encoded.cache.read(by_name[stem].key) for stem in (target.stem, "copy"))
    assert by_name[target.stem].record.prompt == by_name["copy"].record.prompt
    assert torch.equal(one.target_latents, two.target_latents)
    assert one.prompt_embeds.shape == two.prompt_embeds.shape
    relative = (one.prompt_embeds - two.prompt_embeds).norm() / one.prompt_embeds.norm()
    assert relative > 0.05, "not by rounding"
    assert "1 encoded, 3 found" in caching.capsys.readouterr().out


@pytest.mark.parametrize("override", ["data.resize.control.area=2048", "model.dtype=bfloat16"])
def test_what_all_entries_depend_on_makes_all_miss(caching: Caching, override: str) -> None:
    keep_few(caching.data)
    assert caching(override) == (FEW, 0)
    assert caching(override) == (0, FEW)
    assert caching() == (0, FEW), "the entries there were are still there"


def test_other_encoder_weights_make_all_miss(caching: Caching, copy_of_base: Path) -> None:
    keep_few(caching.data)
    override = f"model.pretrained_model_name_or_path={copy_of_base}"
    assert caching(override) == (0, FEW), "the contents count, not the folder"
    weights = copy_of_base / "vae" / "diffusion_pytorch_model.safetensors"
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size, "only the content tells, as after a copy that keeps times"
    assert caching(override) == (FEW, 0)


@pytest.mark.parametrize("file", ["tokenizer/tokenizer_config.json", "text_encoder/config.json"])
def test_every_file_of_the_encoders_counts(caching: Caching, copy_of_base: Path, file: str) -> None:
    keep_few(caching.data)
    with (copy_of_base / file).open("a", encoding="utf-8") as opened:
        opened.write("\n")
    assert caching(f"model.pretrained_model_name_or_path={copy_of_base}") == (FEW, 0)


def test_a_damaged_entry_is_made_again(caching: Caching) -> None:
    change_prompt(caching.data)
    item = caching.encoded().train[0]
    path = caching.cache / item.key[:2] / f"{item.key}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    caching.capsys.readouterr()
    assert caching() == (1, ALL - 1)
    assert path.read_bytes() == whole


def same(a: Sample, b: Sample) -> bool:
    tensors = [
        (a.target_latents, b.target_latents),
        (a.prompt_embeds, b.prompt_embeds),
        *zip(a.control_latents, b.control_latents, strict=True),
    ]
    masks = a.edit_mask is b.edit_mask is None or (
        a.edit_mask is not None and b.edit_mask is not None and torch.equal(a.edit_mask, b.edit_mask)
    )
    equal = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors)
    return equal and masks and a.img_shapes == b.img_shapes and a.name == b.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_back_is_what_the_family_encodes(caching: Caching, dtype: str) -> None:
    keep_few(caching.data)
    add_mask(caching.data)
    config = caching.config(f"model.dtype={dtype}")
    encoded = caching.encoded(f"model.dtype={dtype}")
    encoders = QwenImageEdit(config.model.pretrained_model_name_or_path).load_encoders(
        dtype=getattr(torch, dtype), device="cpu"
    )
    limits = image_limits(config)
    for item in [*encoded.train, *encoded.held_out]:
        record = item.record
        direct = QwenImageEdit("").encode(
            encoders,
            name=record.name,
            target=read_image(record.target, limits),
            target_size=item.target_size,
            controls=[read_image(path, limits) for path in record.controls],
            prompt=record.prompt,
            mask=Image.new("L", read_image(record.target, limits).size, 255) if record.mask else None,
            areas={"control_area": 4096},
        )
        assert same(encoded.cache.read(item.key, name=record.name), direct)
        assert item.lengths.target == len(direct.target_latents)
        assert item.lengths.text == len(direct.prompt_embeds)
        assert item.lengths.image == len(direct.target_latents) + len(direct.control_latents[0])
    assert encoded.train[0].entry.has_mask


def living_encoders() -> set[int]:
    kinds = (AutoencoderKLQwenImage, Qwen2_5_VLForConditionalGeneration)
    return {id(thing) for thing in gc.get_objects() if type(thing) in kinds}


def test_the_encoders_are_gone_when_the_pass_returns(caching: Caching, tiny_base: Path) -> None:
    gc.collect()
    before = living_encoders()
    change_prompt(caching.data)
    change_control(caching.data)
    caching.encoded()
    assert "1 encoded" in caching.capsys.readouterr().out
    assert living_encoders() <= before
    held = QwenImageEdit(str(tiny_base)).load_encoders(dtype=torch.float32, device="cpu")
    assert len(living_encoders() - before) == 2, "the check sees encoders that live"
    del held


def damage(data: Path) -> list[str]:
    """Four problems in both parts; what each message must name."""
    images, controls = data / "train" / "training_images", data / "train" / "control_images"
    names = sorted(path.name for path in images.glob("*.png"))
    (images / names[0]).write_bytes((images / names[0]).read_bytes()[:-200])
    (controls / names[1]).unlink()
    (images / names[2]).with_suffix(".txt").write_text(" \n", encoding="utf-8")
    held = first(data, "training_images", "held_out")
    Image.new("RGB", (8, 40)).save(held)
    return [*names[:2], Path(names[2]).stem, held.name]


def test_all_problems_are_told_at_once_before_anything_is_encoded(caching: Caching, tmp_path: Path) -> None:
    expected = damage(caching.data)
    caching.cache = tmp_path / "empty"
    with pytest.raises(UserError) as caught:
        caching()
    *messages, summary = caught.value.messages
    assert len(messages) == 4
    fix = "fix the data, or set data.on_bad_item=skip to go on with those"
    assert summary == f"data: 4 problems; 9 of 13 examples can be used: {fix}"
    for name in expected:
        assert sum(name in message for message in messages) == 1, name
    assert not list(tmp_path.glob("empty/??/*"))
    assert not (caching.data / "run").exists()


def test_skip_lists_the_problems_and_goes_on(caching: Caching, few_pairs: Path) -> None:
    expected = damage(caching.data)
    assert caching("data.on_bad_item=skip") == (0, 9)
    file = caching.data / "run" / "bad_items.jsonl"
    listed = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [set(line) for line in listed] == [{"path", "reason", "example"}] * 4
    for name in expected:
        assert sum(name in line["path"] for line in listed) == 1, name
    shutil.rmtree(caching.data)
    shutil.copytree(few_pairs, caching.data)
    file.parent.mkdir()
    file.write_text("of an earlier run")
    assert caching("data.on_bad_item=skip") == (0, ALL)
    assert not file.exists(), "a list that is out of date does not stay"


def test_samples_over_the_budget_are_told_before_anything_is_encoded(caching: Caching, tmp_path: Path) -> None:
    caching.cache, expected = tmp_path / "empty", {}
    for path in (caching.data / "train" / "training_images").glob("*.png"):
        with Image.open(path) as target, Image.open(caching.data / "train" / "control_images" / path.name) as control:
            sizes = target_size(Size(*target.size), max_pixels=16384, multiple_of=16), Size(*control.size)
        pixels = math.prod(sizes[0]) + math.prod(control_size(sizes[1], area=4096))
        expected[f"training_images/{path.name}"] = pixels // 256
    most = sorted(expected.values())[-3] - 1
    words = [f"data.train={caching.data / 'train'}", "data.held_out=null", f"batch.max_tokens={most}"]
    words += [f"cache.cache_dir={caching.cache}", f"logging.output_dir={tmp_path / 'run'}"]
    assert cli.main(["cache", "--config", str(caching.file), *words]) == 2
    fix = "raise it, or lower data.resize.target.max_pixels"
    told = caching.capsys.readouterr().err.splitlines()
    assert sorted(told) == sorted(
        f"mixres: error: {name}: its pictures alone are {tokens} tokens, over batch.max_tokens = {most}: {fix}"
        for name, tokens in expected.items()
        if tokens > most
    )
    assert len(told) >= 3
    assert not list(caching.cache.glob("??"))


def test_an_example_the_family_cannot_take_is_a_problem_like_others(caching: Caching) -> None:
    control = first(caching.data, "control_images")
    shutil.copyfile(control, control.with_name(f"{control.stem}_control_1.png"))
    first(caching.data, "training_images", "held_out", ".txt").write_text("see <|image_pad|>", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        caching()
    assert len(caught.value.messages) == 3
    assert "exactly one control image, there are 2; give it one" in caught.value.messages[0]
    assert "<|image_pad|>" in caught.value.messages[1]


def test_an_area_that_the_family_does_not_have_is_refused_in_one_line(caching: Caching) -> None:
    with pytest.raises(UserError) as caught:
        caching("data.resize.control.text_area=2048", "data.resize.target.multiple_of=8")
    assert [message.partition(":")[0] for message in caught.value.messages] == [
        "data.resize.target.multiple_of",
        "data.resize.control.text_area",
    ]


def test_both_areas_of_edit_plus_are_part_of_an_entry(
    caching: Caching, base_of: Callable[[Any], Path], pairs_of: Callable[[Any], Path]
) -> None:
    case = CASES["qwen_image_edit_plus"]
    caching.data = shutil.copytree(pairs_of(case), caching.data.with_name("plus"))
    for part, count in (("train", 2), ("held_out", 1)):
        for path in sorted((caching.data / part / "training_images").glob("*.png"))[count:]:
            for file in (path, path.with_suffix(".txt")):
                file.unlink()
            for file in (caching.data / part / "control_images").glob(f"{path.stem}*"):
                file.unlink()
    words = [f"model.pretrained_model_name_or_path={base_of(case)}", *case.overrides()]
    assert caching(*words) == (FEW, 0)
    assert caching(*words) == (0, FEW)
    assert caching(*words, "data.resize.control.text_area=6401") == (FEW, 0)
    assert caching(*words, "data.resize.control.area=12545") == (FEW, 0)
    items = caching.encoded(*words).train
    assert [len(item.entry.img_shapes) - 1 for item in items] == [1, 3]


@pytest.mark.parametrize("multiple", [8, 24])
def test_sides_must_be_whole_tokens(caching: Caching, multiple: int) -> None:
    with pytest.raises(UserError, match=f"data.resize.target.multiple_of: {multiple} is not a multiple of 16"):
        caching(f"data.resize.target.multiple_of={multiple}")


def test_a_rank_that_finds_everything_says_nothing(caching: Caching) -> None:
    config = caching.config()
    other = encode_all(*with_family(config), device=torch.device("cpu"), rank=1, world_size=2)
    assert caching.capsys.readouterr().out == "", "one process speaks"
    assert [item.key for item in other.train] == [item.key for item in caching.encoded().train]


def test_a_rank_whose_rank_0_has_failed_fills_the_cache_alone(caching: Caching, tmp_path: Path) -> None:
    keep_few(caching.data)
    caching.cache = tmp_path / "empty"
    encode_all(*with_family(caching.config()), device=torch.device("cpu"), rank=1, world_size=2)
    assert caching.capsys.readouterr().out == f"cache     rank 1: {FEW} encoded\n"
    assert caching() == (0, FEW)


# --- What changes or goes wrong between the scan and the encoding


@pytest.mark.parametrize("kind", ["training_images", "control_images", "masks"])
def test_a_file_that_changes_after_the_scan_is_never_stored_under_the_old_key(caching: Caching, kind: str) -> None:
    add_mask(caching.data)
    change_prompt(caching.data)
    config = caching.config()
    cache, train, _, keys = keyed_records(*with_family(config), is_main=False)
    missing = {key: item for key, item in zip(keys, train, strict=False) if cache.lookup(key) is None}
    assert len(missing) == 1
    [item] = missing.values()
    path = {"training_images": item.record.target, "control_images": item.record.controls[0], "masks": item.record.mask}
    changed = path[kind]
    assert changed is not None
    with Image.open(changed) as image:
        image.load()
    image.putpixel((0, 0), 7 if image.mode == "L" else (1, 2, 3))
    image.save(changed)
    again = "has changed since the scan: run the same command again"
    for reason in (f"{changed} {again}", f"a file {again} (is empty (0 bytes); copy it again)"):
        with pytest.raises(WorkError, match=re.escape(f"{item.record.name}: {reason}")):
            encode_missing(*with_family(config), cache, missing, (), torch.device("cpu"), 0, 1)
        changed.write_bytes(b"")
    assert all(cache.lookup(key) is None for key in missing)


def test_a_cache_that_cannot_be_made_is_the_users_error(caching: Caching) -> None:
    caching.cache = first(caching.data, "training_images")
    with pytest.raises(UserError, match=r"cache.cache_dir: .* cannot be made \(File exists\): name another folder"):
        caching()


def test_the_space_that_entries_take_is_known_before(caching: Caching) -> None:
    keep_few(caching.data)
    add_mask(caching.data)
    for override in ("model.dtype=float32", "model.dtype=bfloat16", "data.resize.control.area=65536"):
        config = caching.config(override)
        _, train, held_out, keys = keyed_records(*with_family(config), is_main=False)
        estimated = entry_sizes(*with_family(config), dict(zip(keys, [*train, *held_out], strict=True)))
        encoded = caching.encoded(override)
        for key, size in estimated.items():
            real = encoded.cache.path(key).stat().st_size
            assert real < size < 1.1 * real + 12_000, override


@pytest.mark.parametrize("name", CASES)
def test_every_family_caches_the_empty_prompt_in_the_space_that_was_told(
    name: str,
    small_run: Path,
    base_of: Callable[[FamilyCase], Path],
    pairs_of: Callable[[FamilyCase], Path],
    tmp_path: Path,
) -> None:
    case = CASES[name]
    base, pairs, module = base_of(case), pairs_of(case), case.at(base_of(case))
    common = [f"model.pretrained_model_name_or_path={base}", "data.caption_dropout=0.5"]
    folders = [f"data.{part}={pairs / part}" for part in ("train", "held_out")]
    places = [f"cache.cache_dir={tmp_path / 'cache'}", f"logging.output_dir={tmp_path / 'run'}"]
    config = load_config(small_run, [*common, *folders, *places, *case.overrides()])
    _, train, held_out, keys = keyed_records(config, module, is_main=False)
    missing = dict(zip(keys, [*train, *held_out], strict=True))
    estimated = entry_sizes(config, module, missing, keys[: len(train)])
    foreseen = foreseen_entries(config, module, missing, keys[: len(train)])
    encoded = encode_all(config, module, device=torch.device("cpu"))
    assert foreseen == {key: encoded.cache.lookup(key) for key in keys}, "token for token"
    for key, size in estimated.items():
        real = encoded.cache.path(key).stat().st_size
        assert real < size < 1.1 * real + 25_000
    encoders = module.load_encoders(dtype=torch.float32, device="cpu")
    for item in encoded.train[:3]:
        controls = [read_image(path, image_limits(config)) for path in item.record.controls]
        areas = control_areas(config, module, item.target_size)
        empty = module.encode_prompt(encoders, controls=controls, prompt="", areas=areas)
        cached = encoded.cache.read(item.key).empty_embeds
        assert cached is not None
        assert torch.equal(cached, empty)
    assert all(encoded.cache.read(item.key).empty_embeds is None for item in encoded.held_out)


def test_pickles_in_the_cache_and_the_base_run_nothing(caching: Caching, copy_of_base: Path, tmp_path: Path) -> None:
    keep_few(caching.data)
    witness = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(witness),)

    items = caching.encoded().train
    entry = caching.cache / items[0].key[:2] / f"{items[0].key}.safetensors"
    planted = [entry, *(caching.cache / name for name in ("index.json", "fingerprints.json", "cache.pt", "index.pkl"))]
    planted += [copy_of_base / "vae" / "diffusion_pytorch_model.bin", copy_of_base / "tokenizer" / "tokens.pkl"]
    for path in planted:
        path.write_bytes(pickle.dumps(Payload()))
    caching.capsys.readouterr()
    assert caching(f"model.pretrained_model_name_or_path={copy_of_base}") == (1, FEW - 1)
    assert caching() == (0, FEW)
    assert not witness.exists()
    pickle.loads(planted[3].read_bytes())
    assert witness.exists(), "the planted ones are not blanks"


def test_spread_takes_all_sizes_evenly(caching: Caching) -> None:
    items = caching.encoded().train
    tokens = sorted(item.entry.target_tokens for item in items)
    assert [item.entry.target_tokens for item in spread(items, 99)] == tokens
    some = [item.entry.target_tokens for item in spread(items, 4)]
    assert (some[0], some[-1], len(some)) == (tokens[0], tokens[-1], 4)
    assert some == sorted(some)
    assert spread(items, 4) == spread(reversed(items), 4)
