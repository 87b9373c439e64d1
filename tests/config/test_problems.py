"""What is wrong is listed at once, one line a key, with the nearest key; what is right is read."""

from pathlib import Path

import pytest
import yaml

from mixres.config.aliases import ELSEWHERE, OTHER_NAMES
from mixres.config.load import load_config
from mixres.config.problems import known_keys
from mixres.config.schema import Config
from mixres.errors import UserError

ROOT = Path(__file__).parents[2]
REQUIRED = "model: {pretrained_model_name_or_path: base}\ndata: {train: pairs}\n"


def load(tmp_path: Path, text: str = REQUIRED, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


def problems(tmp_path: Path, text: str = REQUIRED, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None  # pydantic's and OmegaConf's errors quote values
    return caught.value.messages


def test_problems_of_file_overrides_values_and_rules_are_listed_at_once(tmp_path: Path) -> None:
    text = """
model: {pretrained_model_name_or_path: base, dtype: float16}
data: {train: pairs, on_bad_itm: skip}
train: {max_train_steps: 1.5, seed: 1, seed: 2}
train.seed: 5
"""
    assert sorted(problems(tmp_path, text, "checkpoint.keep=1", "evaluate.use_ema=true", "word")) == [
        "'word': not an override; write section.key=value",
        "checkpoint.keep: given 1, should be greater than or equal to 2",
        "data.on_bad_itm: unknown key; did you mean 'data.on_bad_item'?",
        "evaluate.use_ema: given true with train.ema_decay: given null; set a decay, such as train.ema_decay: 0.999",
        "model.dtype: given \"float16\", should be 'bfloat16', 'float32' or 'float64'",
        "train.max_train_steps: given 1.5, should be a valid integer",
        "train.seed: dots are for overrides; write it nested under 'train:' in the file",
        "train.seed: given twice, again at line 4; take one out",
    ]


@pytest.mark.parametrize("text", ["", "data: {train: '???'}", "{model: null, data: {train: '???'}}"])
def test_both_required_keys_are_missed_at_once(tmp_path: Path, text: str) -> None:
    assert sorted(problems(tmp_path, text, "model.lora.r=8")) == [
        "data.train: not given; write one",
        "model.pretrained_model_name_or_path: not given; write one",
    ]


UNKNOWN = {
    "trian.seed=1": "trian: unknown key; did you mean 'train'?",
    "train.max_grad_nrm=1": "train.max_grad_nrm: unknown key; did you mean 'train.max_grad_norm'?",
    "optimizer.max_grad_norm=5": "optimizer.max_grad_norm: unknown key; did you mean 'train.max_grad_norm'?",
    "batch.batch_size=4": "batch.batch_size: unknown key; did you mean 'batch.samples_per_step'?",
    "model.name=x": "model.name: unknown key; did you mean 'model.pretrained_model_name_or_path'?",
    "optimizer.lr=1e-3": "optimizer.lr: unknown key; did you mean 'optimizer.init_args.lr'?",
    "loss.zzz=1": "loss.zzz: unknown key; known here: normalization, weighting, prior_loss_weight",
    "model.lora.rank=1": "model.lora.rank: unknown key; did you mean 'model.lora.r'?",
}


@pytest.mark.parametrize(("override", "expected"), UNKNOWN.items(), ids=UNKNOWN)
def test_unknown_keys_name_the_nearest(tmp_path: Path, override: str, expected: str) -> None:
    assert problems(tmp_path, REQUIRED, override) == (expected,)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_an_unknown_section_is_listed_beside_an_unreadable_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / name, ["trian.max_steps=5", "trian.seed=1", "train.seed=-1"])
    assert caught.value.messages[0].startswith(f"--config {tmp_path / name}: cannot be read: ")
    assert caught.value.messages[1:] == (
        "trian: unknown key; did you mean 'train'?",
        "trian.max_steps: unknown key; did you mean 'train.max_train_steps'?",
        "train.seed: given -1, should be greater than or equal to 0",
    )


def test_names_of_elsewhere_stand_for_keys_and_none_is_a_key_itself() -> None:
    keys = {name for name, _ in known_keys(Config)}
    assert {key for key in OTHER_NAMES.values() if not key.startswith("optimizer.init_args.")} <= keys
    assert not OTHER_NAMES.keys() & keys
    assert len(OTHER_NAMES) == sum(len(names.split()) for names in ELSEWHERE.values()), "each stands for one key"


INTEGER, NUMBER, TEXT, LIST = ("should be a valid " + kind for kind in ("integer", "number", "string", "array"))
TRUTH, SECTION, FINITE = "should be a valid boolean", "should be an object", "should be a finite number"
NOT_EMPTY, CHOICES = "should be text that is not empty", "should be 'logit_normal', 'uniform' or 'mode'"
WRONG = {
    "train.seed='12'": INTEGER,
    "train.seed=1.0": INTEGER,
    "train.seed=012": INTEGER,
    "train.seed=9223372036854775808": "should be less than 9223372036854775808",
    "train.max_train_steps=0": "should be greater than or equal to 1",
    "train.max_grad_norm=1e999": FINITE,
    "data.follow_symlinks=1": TRUTH,
    "model.revision=1234567": TEXT,
    "cache.cache_dir=": TEXT,
    "cache.cache_dir=''": NOT_EMPTY,
    "flow.density=normal": CHOICES,
    "flow=uniform": SECTION,
    "data.train=[]": "should have at least 1 item after validation, not 0",
    "model.lora.target_modules=[to_q, 5]": TEXT,
    "data.held_out=0": f"{LIST}, or should be greater than 0",
    "data.held_out=[a, 3]": f"{TEXT}, or {NUMBER}",
    "evaluate.sigmas=[0.5, 0]": "should be greater than 0",
    "optimizer.class_path=AdamW": "should match pattern",
    "train.gradient_checkpointing=0": f"{TRUTH}, or should be greater than or equal to 1",
    "optimizer.init_args.lr=-1": "allowed: a number >= 0",
    "optimizer.init_args.lr='1e-4'": "allowed: a number >= 0",
    "optimizer.init_args.betas=[0.9, .nan]": FINITE,
}


@pytest.mark.parametrize(("override", "reason"), WRONG.items(), ids=(key[:40] for key in WRONG))
def test_wrong_values_are_one_line_with_key_given_and_reason(tmp_path: Path, override: str, reason: str) -> None:
    (message,) = problems(tmp_path, REQUIRED, override)
    key, _, rest = message.partition(": given ")
    assert key.partition("[")[0] == override.partition("=")[0]
    assert reason in rest and len(message) < 250


RIGHT = {
    "train.max_grad_norm=1": 1.0,
    "optimizer.init_args.betas=[0.9, 0.99]": [0.9, 0.99],
    "train.mixed_precision=no": "no",
    "data.held_out=0.1": 0.1,
    "data.held_out=a": ("a",),
    "model.lora.target_modules=to_q": ("to_q",),
    "evaluate.sigmas=[0.5, 1]": (0.5, 1.0),
    "train.gradient_checkpointing=3": 3,
}


@pytest.mark.parametrize(("override", "value"), RIGHT.items(), ids=RIGHT)
def test_right_values(tmp_path: Path, override: str, value: object) -> None:
    found: object = load(tmp_path, REQUIRED, override)
    for part in override.partition("=")[0].split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value and type(found) is type(value)


PADDED = ("train.compile=true", "batch.layout=padded")
CLASHES = {
    "float64 needs train.mixed_precision: no": ("model.dtype=float64",),
    "the warm-up must not be longer than the run": (
        "lr_scheduler.scheduler_type=linear", "lr_scheduler.warmup_steps=2000",
    ),
    "constant has no warm-up: use constant_with_warmup": ("lr_scheduler.warmup_steps=5",),
    "there are no samples to weight: name some": ("loss.prior_loss_weight=0.5",),
    "set a decay, such as train.ema_decay: 0.999": ("sample.use_ema=true",),
    "allowed: each value once": ("evaluate.sigmas=[0.5, 0.2, 0.5]",),
    "quantised weights cannot be trained: train a LoRA, or set null": ("model.quantize=int8", "model.lora=null"),
    "quantised weights cannot be split: use ddp, or set null": ("model.quantize=fp8", "train.parallel=fsdp2"),
    "quantised weights compute in bfloat16 or float32: choose one": (
        "model.quantize=int8", "model.dtype=float64", "train.mixed_precision=no",
    ),
    "each packed batch would be compiled anew: use padded": ("train.compile=true",),
    "compiled blocks cannot be split: use ddp, or set false": (*PADDED, "train.parallel=fsdp2"),
    "quantised layers cannot be compiled: set one to its default": (*PADDED, "model.quantize=int8"),
    "DoRA layers cannot be compiled: set one to false": (*PADDED, "model.lora.use_dora=true"),
    "one of them must be above 0": ("data.mask_weight.foreground=0", "data.mask_weight.background=0"),
}  # fmt: skip


@pytest.mark.parametrize(("fix", "overrides"), CLASHES.items(), ids=CLASHES)
def test_keys_that_clash_are_found_beside_another_problem(tmp_path: Path, fix: str, overrides: tuple[str, ...]) -> None:
    other, clash = problems(tmp_path, REQUIRED, *overrides, "loss.normalization=batch")
    assert other.startswith("loss.normalization") and clash.endswith(f"; {fix}")


def test_a_rule_waits_for_its_keys_to_be_right_and_belongs_to_the_schema(tmp_path: Path) -> None:
    assert len(problems(tmp_path, REQUIRED, "evaluate.use_ema=true", "train.ema_decay=2")) == 1
    with pytest.raises(ValueError, match="set a decay"):
        Config.model_validate(load(tmp_path).model_dump() | {"sample": {"use_ema": True}})


def test_no_message_holds_the_value_behind_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXRES_TEST", "s3cret")
    secret = "${oc.env:MIXRES_TEST}"
    keys = "train.seed model.dtype resume optimizer.init_args.lr flow train.sed evaluate.every logging.report_to"
    overrides = [f"{key}={secret}" for key in keys.split()]
    overrides += [f"loss.weighting=x-{secret}", f"model.lora.target_modules=[{secret!r}, 5]"]
    overrides += ["logging.tracker_project_name=${resume}", "data.train=${logging}", "sample=${evaluate}"]
    messages = problems(tmp_path, REQUIRED, *overrides)
    assert len(messages) == len(overrides)
    assert "s3cret" not in "\n".join(messages)
    hint = f'train.seed: given "{secret}" (what an environment variable holds is text), {INTEGER}'
    assert hint in messages
    (clash,) = problems(tmp_path, REQUIRED, "model.dtype=float64", "train.mixed_precision=${oc.env:NONE,bf16}")
    assert 'train.mixed_precision: given "${oc.env:NONE,bf16}"' in clash


@pytest.mark.parametrize(
    "name", ["quickstart", "qwen_image_lora", "qwen_image_edit_lora", "qwen_image_edit_plus_lora", "flux2_klein_lora"]
)
def test_shipped_configs_are_valid_and_frozen(name: str) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(ROOT / f"configs/{name}.yaml").train.seed = 1  # type: ignore[misc]


def test_the_real_recipe_names_and_comments_every_key() -> None:
    text = (ROOT / "configs/qwen_image_edit_lora.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    for name, _ in known_keys(Config):
        value = values
        for part in name.split("."):
            assert part in value, f"{name} is not in the recipe"
            value = value[part]
    for block in text.split("\n\n"):  # a comment above or beside each key line, or above those next to it
        commented = False
        for line in filter(str.strip, block.splitlines()):
            commented |= "#" in line
            assert commented or line.endswith(":"), line
