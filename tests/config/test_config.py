"""What is written is what is read, what is wrong is listed at once, one line a key, and no secret is shown."""

import json
from pathlib import Path

import pytest
import yaml

from mixres.config.aliases import ELSEWHERE, OTHER_NAMES
from mixres.config.load import dump_config, load_config, public_config, read_source
from mixres.config.problems import Source, known_keys, value_at
from mixres.config.schema import Config
from mixres.errors import UserError
from support.jobs import REPOSITORY

REQUIRED = "model: {pretrained_model_name_or_path: base}\ndata: {train: pairs}\n"


def read(tmp_path: Path, text: str, *overrides: str) -> Source:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return read_source(path, overrides)


def load(tmp_path: Path, text: str = REQUIRED, *overrides: str) -> Config:
    read(tmp_path, text)
    return load_config(tmp_path / "config.yaml", overrides)


SCALARS = {
    "012": "012",
    "3:30": "3:30",
    "no": "no",
    "1e-4": 1e-4,
    "-12": -12,
    "64_000_000": 64_000_000,
    "true": True,
    "null": None,
    "": None,
    '"12"': "12",
    "[0.9, 1e-2]": [0.9, 0.01],
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items(), ids=map(repr, SCALARS))
def test_scalars_read_as_written_in_file_and_override(tmp_path: Path, text: str, value: object) -> None:
    for source in (read(tmp_path, f"x: {text}\n"), read(tmp_path, "", f"x={text}")):
        assert not source.problems
        assert source.resolved["x"] == value
        assert type(source.resolved["x"]) is type(value)


def test_defaults_file_and_overrides_merge_key_by_key(tmp_path: Path) -> None:
    text = REQUIRED + "optimizer: {init_args: {betas: [0.8, 0.9]}}\ntrain: {seed: 3}\ncache: null\n"
    words = ["train.seed=5", "cache.x.y=7", "train.seed=6", "optimizer.init_args.betas=[1]"]
    values = read(tmp_path, text, *words).resolved
    assert (values["train"]["seed"], values["train"]["max_train_steps"]) == (6, 1000)
    assert values["optimizer"]["init_args"] == {"lr": 1e-4, "betas": [1]}
    assert values["cache"] == {"x": {"y": 7}}
    off = REQUIRED.replace("base}", "base, lora: null}")
    assert load(tmp_path, off).model.lora is None
    assert load(tmp_path, off, "model.lora.r=8").model.lora == load(tmp_path, REQUIRED, "model.lora.r=8").model.lora


FILES = {
    "duplicates": (
        "a: {b: 1, b: 2}\nc: 1\nc: 2\n",
        ["a.b: given twice, again at line 1; take one out", "c: given twice, again at line 3"],
    ),
    "alias_bomb": ("a: &a [x]\nb: [*a, *a]\n", ["not valid YAML: aliases are not read"]),
    "python_tag": ("a: !!python/object/apply:os.getcwd []\n", ["a: no plain value; write text, a number, true, f"]),
    "thousands_of_digits": (f"a: {'9' * 5000}\n", ["a: no plain value"]),
    "lone_surrogate": ('a: "\\ud800"\n', ["a: no plain value"]),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, ["nested too deeply; flatten it"]),
    "syntax": ("a: [1\nb: 2\n", ["not valid YAML", "line 2"]),
    "control_character": ("a: \x01\n", ["not valid YAML: it holds a character that YAML does not take"]),
    "list": ("- 1\n", ["holds no `key: value` lines at its top level; write some"]),
    "not_utf8": ("a: \ud800\n", ["cannot be read: not UTF-8 text; name another file"]),
}


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES)
def test_problems_of_a_file(tmp_path: Path, text: str, expected: list[str]) -> None:
    lines = [line for _, line in read(tmp_path, text).problems]
    assert len(lines) == (2 if text.startswith("a: {b") else 1)
    assert all(part in "\n".join(lines) for part in expected), lines


def test_an_override_that_is_none_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    source = read(tmp_path, "", "word", "a.b", "=1", "a..b=1", "+a=secret", "b.yaml", "a.b=[1", "c=1")
    named = [line.partition(":")[0] for _, line in source.problems]
    assert named == ["'word'", "'a.b'", "'=1'", "'a..b'", "'+a'", "b.yaml", "a.b"]
    assert source.problems[0][1] == "'word': not an override; write section.key=value"
    assert source.problems[5][1] == "b.yaml: is a file, not an override; write --config b.yaml"
    assert source.resolved["c"] == 1


def test_references_resolve_and_stay_as_written_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXRES_TEST", "s3cret")
    text = "a: {x: 1, y: '${a.x}'}\nb: ['${oc.env:MIXRES_TEST}/d']\nc: ${oc.env:MIXRES_NONE,5}\nd: ${a}\ne: p-${b[0]}\n"
    source = read(tmp_path, text)
    assert not source.problems
    found = {key: source.resolved[key] for key in "abcde"}
    both = {"x": 1, "y": 1}
    assert found == {"a": both, "b": ["s3cret/d"], "c": "5", "d": both, "e": "p-s3cret/d"}
    assert source.written["b"] == ["${oc.env:MIXRES_TEST}/d"]
    assert source.references == [("a", "y"), ("b", 0), ("c",), ("d",), ("e",)]


FORBIDDEN, UNRESOLVED = "allowed references: ${section.key}, ${oc.env:NAME} or", "which cannot be resolved: there is no"
REFUSED = {
    "${oc.create:[1]}": FORBIDDEN,
    "${oc.${a}:X}": FORBIDDEN,
    "${oc.env:X,${oc.decode:1}}": FORBIDDEN,
    "${a}${oc.create:1}": FORBIDDEN,
    "${oc.env:X,'}": FORBIDDEN,
    "${nowhere.x}": UNRESOLVED,
    "${oc.env:MIXRES_NONE}": UNRESOLVED,
}


@pytest.mark.parametrize(("text", "why"), REFUSED.items(), ids=REFUSED)
def test_refused_references(tmp_path: Path, text: str, why: str) -> None:
    source = read(tmp_path, f'a: 1\nx: "{text}"\n')
    ((path, line),) = source.problems
    assert path == ("x",) and line.startswith(f"x: given {text}, {why}")
    assert (source.resolved["a"], source.resolved["x"]) == (1, None)


def test_references_that_multiply_are_refused_before_they_are_read(tmp_path: Path) -> None:
    doubled = "".join(f"x{i}: ${{x{i - 1}}}${{x{i - 1}}}\n" for i in range(1, 61))
    source = read(tmp_path, f"x0: aaaaaaaa\n{doubled}")
    assert [path for path, _ in source.problems] == [(f"x{i}",) for i in range(9, 61)]
    assert source.problems[0][1] == "x9: given ${x8}${x8}, allowed references: 16 in all; write some out"
    assert source.resolved["x8"] == "aaaaaaaa" * 2**8


def test_dump_keeps_references_hides_secrets_and_loads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXRES_TEST", "s3cret")
    variable = "${oc.env:MIXRES_TEST}"
    written = {
        "cache.cache_dir": f"{variable}/cache",
        "logging.output_dir": "${cache.cache_dir}/run",
        "data.held_out": [variable, "b"],
        "data.train": "${logging.tracker_project_name}",
        "optimizer.init_args.api_key": variable,
    }
    config = load(tmp_path, REQUIRED, *(f"{key}={value}" for key, value in written.items()))
    assert (config.logging.output_dir, config.data.held_out) == ("s3cret/cache/run", ("s3cret", "b"))
    assert config.data.train == ("mixres",)
    text = dump_config(config)
    assert "s3cret" not in text
    values = yaml.safe_load(text)
    assert {key: value_at(values, tuple(key.split("."))) for key in written} == written
    assert load(tmp_path, text) == config


def test_plain_secrets_are_hidden_and_declared_keys_are_not(tmp_path: Path) -> None:
    arguments = "optimizer.init_args={lr: 1, hf_token: abc, Password: [abc], nested: {secret_x: 12345}, keys: 1}"
    config = load(tmp_path, REQUIRED, arguments, "optimizer.init_args.token2=${oc.env:NONE,abc}")
    shown = public_config(config)
    hidden = {"hf_token": "***", "Password": ["***"], "nested": {"secret_x": "***"}, "keys": "***", "token2": "***"}
    assert shown["optimizer"]["init_args"] == {"lr": 1, **hidden}
    assert shown["batch"]["max_tokens"] == 16384
    assert "abc" not in dump_config(config)
    with pytest.raises(UserError) as caught:
        load(tmp_path, REQUIRED, "logging.report_to={token: abc}", "sample.steps=[[abc]]")
    assert "abc" not in str(caught.value)


def test_text_that_is_not_utf8_is_named_by_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "/data/caf\udce9")  # what Python makes of a byte that is not UTF-8
    for key, name in (("data.train=${oc.env:FOLDER}", "data.train"), ('"no\\ud800": 1', r"no\ud800")):
        text, words = (REQUIRED, [key]) if "=" in key else (f"{REQUIRED}\n{key}", [])
        with pytest.raises(UserError) as caught:
            load(tmp_path, text, *words)
        assert [*caught.value.messages] == [f"{name}: has a character that UTF-8 does not have; correct it"]


def test_a_dump_of_any_text_loads_as_the_same_config(tmp_path: Path) -> None:
    """Quoting follows YAML 1.1, which takes other texts for numbers than what reads them here."""
    texts = [*filter(str.strip, SCALARS), "1e5", ".nan", "0x1F", "0o7", "a: b", "- c", "# d", " e ", "'", "图\n\t"]
    values = {
        "model": {"pretrained_model_name_or_path": texts[0]},
        "data": {"train": texts},
        "optimizer": {"init_args": {"lr": 1e-300, "x": texts}},
    }
    config = load(tmp_path, json.dumps(values))
    assert config.optimizer.init_args["x"] == texts
    assert load(tmp_path, dump_config(config)) == config


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
    "batch.batch_size=4": "batch.batch_size: unknown key; did you mean 'batch.samples_per_step'?",
    "model.name=x": "model.name: unknown key; did you mean 'model.pretrained_model_name_or_path'?",
    "optimizer.lr=1e-3": "optimizer.lr: unknown key; did you mean 'optimizer.init_args.lr'?",
    "loss.zzz=1": "loss.zzz: unknown key; known here: normalization, weighting, prior_loss_weight",
}


@pytest.mark.parametrize(("override", "expected"), UNKNOWN.items(), ids=UNKNOWN)
def test_unknown_keys_name_the_nearest(tmp_path: Path, override: str, expected: str) -> None:
    assert problems(tmp_path, REQUIRED, override) == (expected,)


IDLE = {  # set, and the notice without and with an edit mask among the samples
    ("flow.logit_mean=0.5", "data.mask_weight.background=0.1"): (
        ["data.mask_weight.background (no sample has a mask)"], [],
    ),
    ("flow.density=uniform", "flow.logit_std=2.0", "flow.mode_scale=1.29"): (
        ["flow.logit_std (flow.density is uniform)"], ["flow.logit_std (flow.density is uniform)"],
    ),
    ("flow.density=mode", "flow.mode_scale=1.0", "flow.shift_value=2.0"): (
        ["flow.shift_value (flow.shift is resolution)"], ["flow.shift_value (flow.shift is resolution)"],
    ),
    ("flow.shift=constant", "flow.shift_value=2.0"): ([], []),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "notices"), IDLE.items(), ids=[words[0] for words in IDLE])
def test_keys_that_change_nothing_are_named(
    tmp_path: Path, overrides: tuple[str, ...], notices: tuple[list[str], list[str]]
) -> None:
    """They are not refused: what idles today may be what an override of tomorrow needs."""
    (tmp_path / "config.yaml").write_text(REQUIRED)
    config = load_config(tmp_path / "config.yaml", overrides)
    assert tuple(config.idle_keys(masks=masks) for masks in (False, True)) == notices


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
TRUTH, FINITE = "should be a valid boolean", "should be a finite number"
NOT_EMPTY, CHOICES = "should be text that is not empty", "should be 'logit_normal', 'uniform' or 'mode'"
WRONG = {
    "train.seed='12'": INTEGER,
    "train.seed=012": INTEGER,
    "train.seed=9223372036854775808": "should be less than 9223372036854775808",
    "train.max_grad_norm=1e999": FINITE,
    "data.follow_symlinks=1": TRUTH,
    "model.revision=1234567": TEXT,
    "cache.cache_dir=''": NOT_EMPTY,
    "flow.density=normal": CHOICES,
    "model.lora.target_modules=[to_q, 5]": TEXT,
    "data.held_out=0": f"{LIST}, or should be greater than 0",
    "data.held_out=[a, 3]": f"{TEXT}, or {NUMBER}",
    "data.columns={trget: jpg}": "should match pattern",
    "data.columns={target: 5}": TEXT,
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


PADDED = ("train.compile=true", "batch.layout=padded")
CLASHES = {
    "float64 needs train.mixed_precision: no": ("model.dtype=float64",),
    "the warm-up must not be longer than the run: lower it": (
        "lr_scheduler.scheduler_type=linear", "lr_scheduler.warmup_steps=2000",
    ),
    "constant has no warm-up: use constant_with_warmup": ("lr_scheduler.warmup_steps=5",),
    "only the resolution shift depends on steps: set null": ("flow.shift=none", "flow.shift_steps=4"),
    "there are no samples to weight: name some": ("loss.prior_loss_weight=0.5",),
    "set a decay, such as train.ema_decay: 0.999": ("sample.use_ema=true",),
    "allowed: each value once": ("evaluate.sigmas=[0.5, 0.2, 0.5]",),
    "quantised weights cannot be trained: train a LoRA, or set null": ("model.quantize=int8", "model.lora=null"),
    "quantised weights cannot be split: use ddp, or set null": ("model.quantize=fp8", "train.parallel=fsdp2"),
    "quantised weights compute in bfloat16 or float32: choose one": (
        "model.quantize=int8", "model.dtype=float64", "train.mixed_precision=no",
    ),
    "each packed batch would be compiled anew: use padded": ("train.compile=true",),
    "only fsdp2 splits weights: use it, or leave the key out": ("train.shard_size=4",),
    "compiled blocks cannot be split: use ddp, or set false": (*PADDED, "train.parallel=fsdp2"),
    "quantised layers cannot be compiled: set one to its default": (*PADDED, "model.quantize=int8"),
    "DoRA layers cannot be compiled: set one to false": (*PADDED, "model.lora.use_dora=true"),
    "lokr layers cannot be compiled: set false": (*PADDED, "model.adapter=lokr"),
    "loha has no dropout: set 0": ("model.adapter=loha", "model.lora.lora_dropout=0.1"),
    "lokr has no lengths of rows: set false, or model.adapter: dora": (
        *("model.adapter=lokr", "model.lora.use_dora=true"),
    ),
    "they are two names of one setting: leave one of them out": ("model.adapter=dora", "model.lora.use_dora=false"),
    "loha needs weights of their own shape: use int8, fp8 or null": ("model.adapter=loha", "model.quantize=nf4"),
    "without model.lora there are no adapters: leave one of the two out": ("model.adapter=dora", "model.lora=null"),
    "offloading recomputes all blocks: set true": ("train.offload.blocks=2", "train.gradient_checkpointing=2"),
    "compiled blocks cannot be offloaded: set one to its default": (*PADDED, "train.offload.activations=true"),
    "split blocks cannot be offloaded: use ddp, or offload none": ("train.offload.blocks=2", "train.parallel=fsdp2"),
    "only what is frozen is swapped: train a LoRA, or set null": ("train.offload.blocks=2", "model.lora=null"),
    "cannot be swapped: use int8, fp8 or null": ("train.offload.blocks=2", "model.quantize=nf4"),
    "one of them must be above 0": ("data.mask_weight.foreground=0", "data.mask_weight.background=0"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "adapter", "dora"),
    [
        ((), "lora", False),
        (("model.adapter=dora",), "dora", True),
        (("model.lora.use_dora=true",), "dora", True),
        (("model.adapter=lokr", "model.lora.factor=-1"), "lokr", False),
    ],
)
def test_the_old_key_of_dora_and_the_new_one_mean_each_other(
    tmp_path: Path, given: tuple[str, ...], adapter: str, dora: bool
) -> None:
    model = load(tmp_path, REQUIRED, *given).model
    assert model.lora and (model.adapter, model.lora.use_dora) == (adapter, dora)
    assert model.adapter_settings()["adapter"] == adapter


@pytest.mark.parametrize("written", ["adapter: dora", "lora: {use_dora: true}", "adapter: '${oc.env:KIND,dora}'", None])
@pytest.mark.parametrize(
    ("override", "adapter", "dora"),
    [
        ("model.adapter=dora", "dora", True),
        ("model.adapter=lora", "lora", False),
        ("model.adapter=lokr", "lokr", False),
        ("model.lora.use_dora=true", "dora", True),
        ("model.lora.use_dora=false", "lora", False),
    ],
)
def test_an_override_of_one_name_of_dora_replaces_both(
    tmp_path: Path, written: str | None, override: str, adapter: str, dora: bool
) -> None:
    """Of a file that names either, and of one that a run has left, which holds both."""
    left = dump_config(load(tmp_path, REQUIRED, "model.adapter=dora"))
    file = REQUIRED.replace("base}", f"base, {written}}}") if written else left
    if written and "KIND" in written and override == "model.lora.use_dora=false":
        assert "model.adapter: given" in problems(tmp_path, file, override)[0]
        return
    model = load(tmp_path, file, override).model
    assert model.lora and (model.adapter, model.lora.use_dora) == (adapter, dora)


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
    "url",
    [
        "https://me:p/s3cret@x/a.tar",
        "https://x/a.tar?X-Amz-Signature=s3cret",
        "s3://s3cret:s3cret@x/a.tar",
        "s3://AKIA:ab/s3cret@x/a.tar",
        "HTTPS://x/a.tar?sig=s3cret",
        "az://x/a.tar?sv=1&sig=s3cret",
        "filecache::https://x/a.tar?s3cret",
    ],
)
def test_a_url_with_credentials_is_refused_without_them(tmp_path: Path, url: str) -> None:
    for key in ("data.train", "data.held_out", "data.regularization", "cache.cache_dir"):
        for value in (url, f"[folder, '{url}']")[: 1 if key == "cache.cache_dir" else 2]:
            (message,) = problems(tmp_path, REQUIRED, f"{key}={value}")
            assert message.startswith(f"{key}: given ") and "s3cret" not in message
            assert "should be a URL without user, password and query string: config.yaml keeps them" in message
    plain = ("s3://x/a-?.tar", "hf://datasets/me/set@main/*.parquet", "https://x/a-{0..9}.tar")
    assert load(tmp_path, REQUIRED, f"data.train={list(plain)}").data.train == plain


def test_shipped_configs_are_valid_and_frozen() -> None:
    for file in (REPOSITORY / "configs").glob("*.yaml"):
        with pytest.raises(ValueError, match="frozen"):
            load_config(file).train.seed = 1  # type: ignore[misc]


def test_the_real_recipe_names_every_key() -> None:
    values = yaml.safe_load((REPOSITORY / "configs/qwen_image_edit_lora.yaml").read_text(encoding="utf-8"))
    for name, _ in known_keys(Config):
        value_at(values, tuple(name.split(".")))
