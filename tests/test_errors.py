import pytest

from mixres.errors import Problems, UserError, WorkError, without_secrets


def test_a_message_is_one_printable_line() -> None:
    error = UserError(["a\nb.png: broken", "\x1b[31mred", "\udc80: not UTF-8", "图片: 中文 stays"])
    assert error.messages == ("a\\nb.png: broken", "\\x1b[31mred", "\\udc80: not UTF-8", "图片: 中文 stays")
    assert str(error).splitlines() == list(error.messages)
    assert UserError("one").messages == ("one",)
    assert str(WorkError("disk\nfull")) == "disk\\nfull"


def test_problems_raises_everything_wrong_at_once() -> None:
    def parse(text: str) -> int:
        if text.isdigit():
            return int(text)
        raise UserError([f"{text}: is no number", "give digits"])

    problems = Problems(["first"])
    assert (problems.collect(parse, "12"), problems.collect(parse, text="x")) == (12, None)
    with problems.collecting():
        problems.add("inside", "first")
        parse("y")
    with pytest.raises(UserError) as caught:
        problems.raise_if_any()
    assert caught.value.messages == ("first", "x: is no number", "give digits", "inside", "y: is no number")

    Problems().raise_if_any()
    with pytest.raises(ZeroDivisionError), Problems().collecting():
        _ = 1 // 0


def test_urls_in_messages_lose_their_secrets() -> None:
    text = "GET https://me:pw@x/a?sig=1&key=2, 's3://k:s@b/a-?.tar' and hf://datasets/a/b@main/c of https://y/z?q"
    shown = "GET https://***@x/a?*** 's3://***@b/a-?.tar' and hf://datasets/a/b@main/c of https://y/z?***"
    assert without_secrets(text) == shown
    text = "s3://AKIA:ab/cd@b/x.tar, HTTPS://h/x?sig=S az://c/x.tar?sv=1&sig=S s3://b/a-?.tar"
    assert without_secrets(text) == "s3://***@b/x.tar, HTTPS://h/x?*** az://c/x.tar?*** s3://b/a-?.tar"
