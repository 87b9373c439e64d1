"""Reading, merging, resolving and showing: what is written is what is read, and no secret is shown."""

import json
from pathlib import Path

import pytest
import yaml

from mixres.config.load import dump_config, load_config, public_config, read_source
from mixres.config.problems import Source, value_at
from mixres.config.schema import Config

REQUIRED = "model: {pretrained_model_name_or_path: base}\ndata: {train: pairs}\n"


def read(tmp_path: Path, text: str, *overrides: str) -> Source:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return read_source(path, overrides)


def load(tmp_path: Path, text: str = REQUIRED, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


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
    "${shell:ls}": FORBIDDEN,
    "${oc.${a}:X}": FORBIDDEN,
    "${oc.env:X,${oc.decode:1}}": FORBIDDEN,
    "${": FORBIDDEN,
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
