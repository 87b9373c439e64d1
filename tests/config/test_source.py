from pathlib import Path
from typing import Any

import pytest

from mixres.config.source import Source, dotted, leaves, read_source


def read(tmp_path: Path, text: str, *overrides: str, defaults: dict[str, Any] | None = None) -> Source:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return read_source(path, overrides, defaults or {})


SCALARS = {
    "octal_is_text": ("012", "012"),
    "revision_is_text": ("0123456", "0123456"),
    "sexagesimal_is_text": ("3:30", "3:30"),
    "no_is_text": ("no", "no"),
    "on_is_text": ("on", "on"),
    "date_is_text": ("2026-01-01", "2026-01-01"),
    "exponent": ("1e-4", 1e-4),
    "exponent_with_point": ("1.5E+3", 1500.0),
    "point_first": (".5", 0.5),
    "zero_fraction": ("0.25", 0.25),
    "integer": ("-12", -12),
    "zero": ("0", 0),
    "grouped": ("64_000_000", 64_000_000),
    "true": ("true", True),
    "null": ("null", None),
    "tilde": ("~", None),
    "nothing": ("", None),
    "quoted": ('"12"', "12"),
    "flow_list": ("[0.9, 1e-2]", [0.9, 0.01]),
    "equals": ("a=b", "a=b"),
}


@pytest.mark.parametrize(("text", "value"), SCALARS.values(), ids=SCALARS)
def test_scalars_read_as_written_in_file_and_override(tmp_path: Path, text: str, value: object) -> None:
    for source in (read(tmp_path, f"x: {text}\n"), read(tmp_path, "", f"x={text}")):
        assert not source.problems
        assert source.resolved == {"x": value}
        assert type(source.resolved["x"]) is type(value)


def test_defaults_file_and_overrides_merge_key_by_key(tmp_path: Path) -> None:
    defaults = {"a": {"x": 1, "y": 2, "z": [1, 2]}, "b": {"p": 1}, "c": 0}
    source = read(tmp_path, "a: {y: 3, z: [9]}\nb: null\n", "a.x=5", "b.q.r=7", "a.x=6", defaults=defaults)
    assert source.resolved == {"a": {"x": 6, "y": 3, "z": [9]}, "b": {"q": {"r": 7}}, "c": 0}
    assert defaults["a"] == {"x": 1, "y": 2, "z": [1, 2]}


FAULTS = {
    "duplicates": (
        "a: {b: 1, b: 2}\nc: 1\nc: 2\n",
        ["a.b: given twice, again at line 1; take one out", "c: given twice"],
    ),
    "alias_bomb": ("a: &a [x]\nb: [*a, *a]\n", ["not valid YAML: aliases are not read"]),
    "python_tag": ("a: !!python/object/apply:os.getcwd []\n", ["a: tagged or oversized"]),
    "binary_tag": ("a: !!binary aGk=\n", ["a: tagged or oversized"]),
    "thousands_of_digits": (f"a: {'9' * 5000}\n", ["a: tagged or oversized"]),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, ["nested too deeply"]),
    "syntax": ("a: [1\nb: 2\n", ["not valid YAML", "line 2"]),
    "two_documents": ("a: 1\n---\nb: 1\n", ["not valid YAML"]),
    "list": ("- 1\n", ["holds no `key: value` lines"]),
    "word": ("abc\n", ["holds no `key: value` lines"]),
    "control_character": ("a: \x01\n", ["not valid YAML"]),
    "lone_surrogate": ('a: "\\ud800"\n', ["a: not valid Unicode text"]),
    "not_utf8": ("a: \ud800\n", ["not UTF-8 text"]),
    "missing_marker": ("a: ???\n", ["a: given ???"]),
}


@pytest.mark.parametrize(("text", "expected"), FAULTS.values(), ids=FAULTS)
def test_problems_of_a_file(tmp_path: Path, text: str, expected: list[str]) -> None:
    messages = "\n".join(message for _, message in read(tmp_path, text).problems)
    assert all(part in messages for part in expected), messages


def test_an_override_that_is_none_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    source = read(tmp_path, "", "word", "=1", "a..b=1", "+a=1", "a.b=[1", "c=1")
    messages = [message for _, message in source.problems]
    assert [message.partition(":")[0] for message in messages] == ["'word'", "'=1'", "'a..b'", "'+a'", "a.b"]
    assert source.resolved["c"] == 1


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        source = read_source(path, ["a=1"], {})
        assert not source.file_is_read
        assert source.resolved == {"a": 1}
        assert [str(path) in message for _, message in source.problems] == [True]


def test_references_resolve_and_stay_as_written_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXRES_TEST", "s3cret")
    text = "a: {x: 1, y: '${a.x}'}\nb: ['${oc.env:MIXRES_TEST}/d']\nc: ${oc.env:MIXRES_NONE,5}\nd: ${a}\ne: p-${b[0]}\n"
    source = read(tmp_path, text)
    assert not source.problems
    assert source.resolved == {
        "a": {"x": 1, "y": 1},
        "b": ["s3cret/d"],
        "c": "5",
        "d": {"x": 1, "y": 1},
        "e": "p-s3cret/d",
    }
    assert source.written["b"] == ["${oc.env:MIXRES_TEST}/d"]
    assert source.references == {("a", "y"), ("b", 0), ("c",), ("d",), ("e",)}


REFUSED = {
    "create": "${oc.create:[1]}",
    "decode": "${oc.decode:1}",
    "select": "${oc.select:a}",
    "unknown_resolver": "${shell:ls}",
    "built_name": "${oc.${a}:X}",
    "nested": "${oc.env:X,${oc.decode:1}}",
    "unclosed": "${",
    "behind_a_good_one": "${a}${oc.create:1}",
    "bad_grammar": "${oc.env:X,'}",
    "absent_key": "${nowhere.x}",
    "itself": "${x}",
    "absent_variable": "${oc.env:MIXRES_NONE}",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_refused_references(tmp_path: Path, text: str) -> None:
    source = read(tmp_path, f"a: 1\nx: {text!r}\n" if "'" not in text else f'a: 1\nx: "{text}"\n')
    assert [path for path, _ in source.problems] == [("x",)]
    assert source.resolved == {"a": 1, "x": None}


def test_references_that_multiply_are_refused_before_they_are_read(tmp_path: Path) -> None:
    doubled = "".join(f"x{i}: ${{x{i - 1}}}${{x{i - 1}}}\n" for i in range(1, 61))
    source = read(tmp_path, f"x0: aaaaaaaa\n{doubled}")
    assert [path for path, _ in source.problems] == [(f"x{i}",) for i in range(9, 61)]
    assert source.problems[0][1] == "x9: given ${x8}${x8}, allowed: 16 references in all: write some out"
    assert source.resolved["x8"] == "aaaaaaaa" * 2**8


def test_key_paths_read_like_overrides() -> None:
    assert dotted(("a", "b", 0, "c")) == "a.b[0].c"
    assert dict(leaves({"a": [1, {"b": 2}], "c": {}})) == {("a", 0): 1, ("a", 1, "b"): 2}
