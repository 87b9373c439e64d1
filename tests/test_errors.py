from mixres.errors import UserError, WorkError


def test_a_message_is_one_printable_line() -> None:
    error = UserError(["a\nb.png: broken", "\x1b[31mred", "\udc80: not UTF-8", "图片: 中文 stays"])
    assert error.messages == ("a\\nb.png: broken", "\\x1b[31mred", "\\udc80: not UTF-8", "图片: 中文 stays")
    assert str(error).splitlines() == list(error.messages)
    assert UserError("one").messages == ("one",)
    assert str(WorkError("disk\nfull")) == "disk\\nfull"
