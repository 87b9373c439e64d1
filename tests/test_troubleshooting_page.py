"""Each message that docs/troubleshooting.md quotes is one that the code prints."""

import re

from pages import DOCS, script

PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")


def quoted() -> list[str]:
    return [line for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def test_every_quoted_message_is_one_of_the_code() -> None:
    source = script("messages_page")
    templates = {message.text for message in source.all_messages()}
    patterns = [re.compile(re.escape(text).replace(source.GAP, ".+")) for text in templates]
    patterns = [pattern for pattern in patterns if len(pattern.pattern.replace(".+", "")) > 20]
    lines = quoted()
    assert len(lines) > 25
    for line in lines:
        assert any(pattern.fullmatch(line) for pattern in patterns), f"nothing in the code says: {line}"


def test_exit_codes_are_those_of_the_command_line() -> None:
    from mixres.cli_options import EXIT_CODES

    stated = re.findall(r"^\| ([\d, ]+) \|", PAGE, re.MULTILINE)
    numbers = {number for cell in stated for number in cell.split(", ")}
    assert numbers == set(re.findall(r"\b\d+\b", EXIT_CODES))
