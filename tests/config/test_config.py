from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from mixres.config.aliases import ELSEWHERE, OTHER_NAMES
from mixres.config.load import dump_config, load_config, public_config
from mixres.config.problems import allowed, known_keys, section_of
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
    assert caught.value.__context__ is None
    return caught.value.messages


def test_defaults(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.data.train == ("pairs",)
    assert config.data.held_out is None
    assert config.model.lora is not None
    assert config.model.lora.target_modules[:4] == ("to_q", "to_k", "to_v", "to_out.0")
    assert config.optimizer.init_args == {"lr": 1e-4}
    assert config.train.mixed_precision == "bf16"
    assert config.data.limits.max_bytes == 512 * 2**20


def test_a_config_with_five_mistakes_reports_five(tmp_path: Path) -> None:
    text = """
model: {pretrained_model_name_or_path: base, dtype: float16}
data: {train: pairs, on_bad_itm: skip}
train: {max_train_steps: 1.5, seed: 1, seed: 2}
"""
    messages = problems(tmp_path, text, "checkpoint.keep=1")
    assert sorted(messages) == [
        "checkpoint.keep: given 1, allowed: an integer >= 2 and <= 1000000",
        "data.on_bad_itm: unknown key; did you mean 'data.on_bad_item'?",
        'model.dtype: given "float16", allowed: one of bfloat16, float32, float64',
        "train.max_train_steps: given 1.5, allowed: an integer >= 1 and <= 1000000000",
        "train.seed: given twice, again at line 4; take one out",
    ]


def test_both_required_keys_are_missed_at_once(tmp_path: Path) -> None:
    messages = problems(tmp_path, "")
    assert [message.partition(",")[0] for message in messages] == [
        "model.pretrained_model_name_or_path: not given",
        "data.train: not given",
    ]


UNKNOWN = {
    "typo_in_section": ("train.max_grad_nrm=1", "did you mean 'train.max_grad_norm'?"),
    "typo_of_section": ("trian.seed=1", "trian: unknown key; did you mean 'train'?"),
    "section_forgotten": ("max_train_steps=5", "did you mean 'train.max_train_steps'?"),
    "wrong_section": ("optimizer.max_grad_norm=5", "did you mean 'train.max_grad_norm'?"),
    "short_leaf_at_top": ("seed=5", "did you mean 'train.seed'?"),
    "name_of_elsewhere": ("batch.batch_size=4", "did you mean 'batch.samples_per_step'?"),
    "name_of_elsewhere_nearer_to_another_key": ("model.name=x", "did you mean 'model.pretrained_model_name_or_path'?"),
    "argument_of_the_optimizer": ("optimizer.lr=1e-3", "did you mean 'optimizer.init_args.lr'?"),
    "nothing_near": ("loss.zzz=1", "known here: normalization, weighting"),
    "in_null_able_section": ("model.lora.rank=1", "model.lora.rank: unknown key; did you mean 'model.lora.r'?"),
}


@pytest.mark.parametrize(("override", "expected"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_keys_name_the_nearest(tmp_path: Path, override: str, expected: str) -> None:
    (message,) = problems(tmp_path, REQUIRED, override)
    assert expected in message
    assert message.startswith(override.partition(".")[0].partition("=")[0])


def test_a_section_and_a_key_in_it_that_are_both_wrong_are_told_at_once(tmp_path: Path) -> None:
    assert problems(tmp_path, REQUIRED, "trian.max_steps=5", "trian.seed=1") == (
        "trian: unknown key; did you mean 'train'?",
        "trian.max_steps: unknown key; did you mean 'train.max_train_steps'?",
    )
    assert problems(tmp_path, REQUIRED + "datset: {init_args: {dataset_path: a}}\n")[0].startswith(
        "datset: unknown key"
    )


def test_names_of_elsewhere_stand_for_keys_and_none_is_a_key_itself() -> None:
    keys = {name for name, _ in known_keys(Config)}
    inside = {name.rpartition(".")[2] for name in keys if name.startswith("optimizer.init_args.")}
    assert {key for key in OTHER_NAMES.values() if not key.startswith("optimizer.init_args.")} <= keys | inside
    assert not OTHER_NAMES.keys() & keys
    assert len(OTHER_NAMES) == sum(len(names.split()) for names in ELSEWHERE.values()), "each stands for one key"


def test_a_number_is_shown_as_it_was_written(tmp_path: Path) -> None:
    rest = "allowed: an integer >= 1 and <= 1000000000"
    text = REQUIRED + "train: {max_train_steps: 2e3}\n"
    assert problems(tmp_path, text) == (f"train.max_train_steps: given 2e3, {rest}",)
    assert problems(tmp_path, text, "train.max_train_steps=1e3") == (f"train.max_train_steps: given 1e3, {rest}",)
    assert problems(tmp_path, text, "train.max_train_steps=[1]") == (f"train.max_train_steps: given [1], {rest}",)


def test_a_dotted_key_in_the_file_is_told_to_nest(tmp_path: Path) -> None:
    assert problems(tmp_path, REQUIRED + "train.seed: 5\n") == (
        "train.seed: dots are for overrides; write it nested under 'train:' in the file",
    )


WRONG = {
    "text_for_integer": "train.seed='12'",
    "fraction_for_integer": "train.seed=1.0",
    "boolean_for_integer": "train.seed=true",
    "boolean_for_number": "train.max_grad_norm=true",
    "text_for_number": "train.max_grad_norm=fast",
    "integer_for_boolean": "data.follow_symlinks=1",
    "yaml_1_1_boolean": "data.follow_symlinks=yes",
    "integer_for_text": "model.revision=1234567",
    "boolean_for_text": "cache.cache_dir=true",
    "empty_text": "cache.cache_dir=''",
    "blank_text": "cache.cache_dir='  '",
    "nul_in_text": 'cache.cache_dir="a\\0b"',
    "null_for_text": "cache.cache_dir=",
    "octal": "train.seed=012",
    "sexagesimal": "train.seed=3:30",
    "nan": "train.max_grad_norm=.nan",
    "infinity": "train.max_grad_norm=.inf",
    "overflow": "train.max_grad_norm=1e999",
    "huge_integer_for_number": "train.max_grad_norm=" + "9" * 400,
    "below": "train.max_train_steps=0",
    "above": "train.seed=9223372036854775808",
    "not_a_choice": "flow.density=normal",
    "case_of_a_choice": "train.mixed_precision=BF16",
    "scalar_for_section": "flow=uniform",
    "list_for_section": "flow=[1]",
    "section_for_scalar": "train.seed={a: 1}",
    "null_for_section": "train=null",
    "empty_list": "data.train=[]",
    "empty_list_item": "data.train=[a, '']",
    "number_in_list": "model.lora.target_modules=[to_q, 5]",
    "no_noise_levels": "evaluate.sigmas=[]",
    "number_for_noise_levels": "evaluate.sigmas=0.5",
    "text_for_noise_levels": "evaluate.sigmas=half",
    "noise_level_of_zero": "evaluate.sigmas=[0.5, 0]",
    "noise_level_above_one": "evaluate.sigmas=[1.01]",
    "weight_of_zero": "loss.prior_loss_weight=0",
    "scalar_for_free_section": "optimizer.init_args=5",
    "class_without_module": "optimizer.class_path=AdamW",
    "negative_learning_rate": "optimizer.init_args.lr=-1",
    "text_learning_rate": "optimizer.init_args.lr='1e-4'",
    "every_zeroth_block": "train.gradient_checkpointing=0",
    "null_learning_rate": "optimizer.init_args.lr=null",
    "nan_learning_rate": "optimizer.init_args.lr=.nan",
    "nan_in_free_list": "optimizer.init_args.betas=[0.9, .nan]",
    "infinity_in_free_section": "optimizer.init_args.eps=.inf",
}


@pytest.mark.parametrize("override", WRONG.values(), ids=WRONG)
def test_wrong_values_are_one_line_with_key_given_and_allowed(tmp_path: Path, override: str) -> None:
    (message,) = problems(tmp_path, REQUIRED, override)
    key = override.partition("=")[0]
    assert message.startswith(key)
    assert "given " in message
    assert "allowed: " in message
    assert len(message) < 250


RIGHT = {
    "integer_for_number": ("train.max_grad_norm=1", lambda c: c.train.max_grad_norm, 1.0),
    "exponent": ("optimizer.init_args.lr=1e-3", lambda c: c.optimizer.init_args["lr"], 1e-3),
    "free_list": ("optimizer.init_args.betas=[0.9, 0.99]", lambda c: c.optimizer.init_args["betas"], [0.9, 0.99]),
    "free_keeps_lr": ("optimizer.init_args.eps=1e-6", lambda c: c.optimizer.init_args, {"lr": 1e-4, "eps": 1e-6}),
    "no_is_no": ("train.mixed_precision=no", lambda c: c.train.mixed_precision, "no"),
    "digits_of_a_revision": ("model.revision=0123456", lambda c: c.model.revision, "0123456"),
    "no_adapters": ("model.lora=null", lambda c: c.model.lora, None),
    "two_sources": ("data.train=[a, b]", lambda c: c.data.train, ("a", "b")),
    "one_target": ("model.lora.target_modules=to_q", lambda c: c.model.lora.target_modules, ("to_q",)),
    "noise_levels": ("evaluate.sigmas=[0.5, 1]", lambda c: c.evaluate.sigmas, (0.5, 1.0)),
    "regularisation": ("data.regularization=a", lambda c: c.data.regularization, ("a",)),
    "every_third_block": ("train.gradient_checkpointing=3", lambda c: c.train.gradient_checkpointing, 3),
    "every_block": ("train.gradient_checkpointing=true", lambda c: c.train.gradient_checkpointing, True),
    "grouped_digits": ("batch.max_tokens=16_384", lambda c: c.batch.max_tokens, 16384),
    "equals_in_value": ("cache.cache_dir=/data/a=b", lambda c: c.cache.cache_dir, "/data/a=b"),
}


@pytest.mark.parametrize(("override", "read", "value"), RIGHT.values(), ids=RIGHT)
def test_right_values(tmp_path: Path, override: str, read: Any, value: object) -> None:
    assert read(load(tmp_path, REQUIRED, override)) == value


def test_adapters_switched_off_in_the_file_come_back_with_an_override(tmp_path: Path) -> None:
    text = "model: {pretrained_model_name_or_path: base, lora: null}\ndata: {train: pairs}\n"
    config = load(tmp_path, text, "model.lora.r=8")
    assert config.model.lora is not None
    assert (config.model.lora.r, config.model.lora.lora_alpha) == (8, 16.0)


CONFLICTS = {
    "float64_under_bf16": (("model.dtype=float64",), "set train.mixed_precision: no, which float64 needs"),
    "warm_up_longer_than_run": (
        ("lr_scheduler.scheduler_type=linear", "lr_scheduler.warmup_steps=2000"),
        "must not be longer than the run",
    ),
    "constant_with_warm_up": (("lr_scheduler.warmup_steps=5",), "write constant_with_warmup"),
    "weight_of_no_samples": (("loss.prior_loss_weight=0.5",), "name some in data.regularization"),
    "average_evaluated_without_decay": (("evaluate.use_ema=true",), "there is no average without a decay, set one"),
    "noise_level_twice": (("evaluate.sigmas=[0.5, 0.2, 0.5]",), "name each noise level only once"),
    "quantised_weights_trained": (("model.quantize=int8", "model.lora=null"), "quantised weights cannot be trained"),
    "quantised_weights_split": (("model.quantize=fp8", "train.parallel=fsdp2"), "cannot be split over devices"),
    "quantised_in_float64": (
        ("model.quantize=int8", "model.dtype=float64", "train.mixed_precision=no"),
        "quantised weights compute in bfloat16 or float32",
    ),
    "compiled_packed": (("train.compile=true",), "each batch would be compiled anew"),
    "compiled_and_split": (
        ("train.compile=true", "batch.layout=padded", "train.parallel=fsdp2"),
        "compiled blocks are not split over devices",
    ),
    "compiled_and_quantised": (
        ("train.compile=true", "batch.layout=padded", "model.quantize=int8"),
        "quantised layers are not compiled",
    ),
    "compiled_dora": (
        ("train.compile=true", "batch.layout=padded", "model.lora.use_dora=true"),
        "DoRA layers cannot be compiled: set train.compile: false, or model.lora.use_dora: false",
    ),
    "all_mask_weights_zero": (
        ("data.mask_weight.foreground=0", "data.mask_weight.background=0"),
        "at least one must be above 0",
    ),
}


@pytest.mark.parametrize(("overrides", "expected"), CONFLICTS.values(), ids=CONFLICTS)
def test_keys_that_clash(tmp_path: Path, overrides: tuple[str, ...], expected: str) -> None:
    messages = problems(tmp_path, REQUIRED, *overrides, "loss.normalization=batch")
    assert len(messages) == 2
    assert expected in messages[1]


def test_problems_of_overrides_are_told_beside_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "absent.yaml", ["train.sed=1", "train.seed=-1"])
    assert len(caught.value.messages) == 3
    assert "absent.yaml: cannot be read" in caught.value.messages[0]


def test_the_config_is_frozen(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 1  # type: ignore[misc]


def test_no_message_holds_the_value_behind_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXRES_TEST", "s3cret")
    secret = "${oc.env:MIXRES_TEST}"
    messages = problems(
        tmp_path,
        REQUIRED,
        f"train.seed={secret}",
        f"model.dtype={secret}",
        f"resume={secret}",
        f"loss.weighting=x-{secret}",
        "logging.report_to=${resume}",
        f"model.lora.target_modules=[{secret!r}, 5]",
        f"optimizer.init_args.lr={secret}",
        f"flow={secret}",
        f"train.sed={secret}",
        "data.train=${logging}",
        f"logging.tracker_project_name={secret}",
    )
    assert len(messages) == 10
    assert "s3cret" not in "\n".join(messages)
    assert "s3cret" not in "".join(
        problems(tmp_path, REQUIRED, "model.dtype=float64", "train.mixed_precision=" + secret)
    )


def test_dump_keeps_references_hides_secrets_and_loads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXRES_TEST", "s3cret")
    config = load(
        tmp_path,
        REQUIRED,
        "cache.cache_dir=${oc.env:MIXRES_TEST}/cache",
        "logging.output_dir=${cache.cache_dir}/run",
        "data.held_out=['${oc.env:MIXRES_TEST}', b]",
        "optimizer.init_args.api_key=${oc.env:MIXRES_TEST}",
    )
    assert config.logging.output_dir == "s3cret/cache/run"
    assert config.data.held_out == ("s3cret", "b")
    text = dump_config(config)
    assert "s3cret" not in text
    values = yaml.safe_load(text)
    assert values["cache"]["cache_dir"] == "${oc.env:MIXRES_TEST}/cache"
    assert values["data"]["held_out"] == ["${oc.env:MIXRES_TEST}", "b"]
    assert values["optimizer"]["init_args"]["api_key"] == "${oc.env:MIXRES_TEST}"
    assert load(tmp_path, text) == config


def test_plain_secrets_are_hidden_and_declared_keys_are_not(tmp_path: Path) -> None:
    arguments = "optimizer.init_args={lr: 1, hf_token: abc, Password: [abc], nested: {secret_x: 12345}, keys: 1}"
    config = load(tmp_path, REQUIRED, arguments, "optimizer.init_args.token2=${oc.env:NONE,abc}")
    shown = public_config(config)
    assert shown["optimizer"]["init_args"] == {
        "lr": 1,
        "hf_token": "***",
        "Password": ["***"],
        "nested": {"secret_x": "***"},
        "keys": "***",
        "token2": "***",
    }
    assert shown["batch"]["max_tokens"] == 16384
    assert "abc" not in dump_config(config)


TEXTS = st.sampled_from(
    ["no", "on", "012", "3:30", "1e-4", "1e5", "null", "~", ".nan", "true", "2026-01-01", "0x1F", "0o7"]
)


@pytest.mark.parametrize(("value", "expected"), [("0.1", 0.1), ("1e-3", 0.001), ("pairs", ("pairs",)), ("null", None)])
def test_held_out_is_a_source_or_a_share(value: str, expected: object) -> None:
    overrides = ["data.train=x", f"data.held_out={value}"]
    assert load_config(ROOT / "configs/quickstart.yaml", overrides).data.held_out == expected


@pytest.mark.parametrize(
    ("value", "where"), [("0", ""), ("1", ""), ("1.5", ""), ("-0.1", ""), ("true", ""), ("[]", ""), ("[a, 3]", "[1]")]
)
def test_what_held_out_cannot_be_is_told_in_one_line(value: str, where: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(ROOT / "configs/quickstart.yaml", [f"data.held_out={value}"])
    given = "3" if where else value
    allowed = "text or a list of texts, not empty, or a number > 0 and < 1, or null"
    assert caught.value.messages == (f"data.held_out{where}: given {given}, allowed: {allowed}",)


@settings(deadline=None, max_examples=50)
@given(text=st.text(min_size=1, max_size=12) | TEXTS, number=st.floats(1e-300, 1e8), names=st.lists(TEXTS, min_size=1))
def test_any_dump_loads_as_the_same_config(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float, names: list[str]
) -> None:
    path = tmp_path_factory.mktemp("round") / "config.yaml"
    values = {
        "model": {"pretrained_model_name_or_path": text, "revision": names[0]},
        "data": {"train": names},
        "optimizer": {"init_args": {"lr": number, "x": text}},
    }
    path.write_text(yaml.safe_dump(values, allow_unicode=True, default_style='"'), encoding="utf-8")
    try:
        config = load_config(path)
    except UserError:
        assert not text.strip() or "\0" in text or "${" in text or text == "???"
        return
    assert config.optimizer.init_args["x"] == text
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_every_key_has_a_meaning_and_says_what_it_takes() -> None:
    for name, field in known_keys(Config):
        assert field.description, name
        assert field.description.endswith("."), name
        assert len(allowed(field)) > 3, name


@pytest.mark.parametrize("name", ["quickstart", "qwen_image_lora", "qwen_image_edit_lora", "qwen_image_edit_plus_lora"])
def test_shipped_configs_are_valid(name: str) -> None:
    load_config(ROOT / f"configs/{name}.yaml")


def test_the_real_recipe_names_and_comments_every_key() -> None:
    text = (ROOT / "configs/qwen_image_edit_lora.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    for name, field in known_keys(Config):
        value = values
        for part in name.split("."):
            assert part in value, f"{name} is not in the recipe"
            value = value[part]
        if section_of(field) is None:
            assert field.description
    assert config_lines_without_comment(text) == []


def config_lines_without_comment(text: str) -> list[str]:
    """Key lines whose section has not one comment line above or beside them."""
    uncommented, commented = [], False
    for line in text.splitlines():
        if not line.strip():
            commented = False
        elif line.strip().startswith("#"):
            commented = True
        elif not line.endswith(":") and "#" not in line and not commented:
            uncommented.append(line)
    return uncommented
