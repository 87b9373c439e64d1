"""One claim, one living process: real processes hold claims, let them go and are killed."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from mixres.data.claims import Claims

Holder = Callable[[Path, str], "AbstractContextManager[subprocess.Popen[str]]"]
KEY, OTHER = "0f" * 16, "0e" * 16


def is_free(claims: Claims, key: str) -> bool:
    with claims.claim(key) as mine:
        return mine


@pytest.fixture
def claims(tmp_path: Path) -> Iterator[Claims]:
    made = Claims(tmp_path)
    yield made
    made.close()


def test_a_claim_of_another_process_is_respected_until_it_lets_go(
    tmp_path: Path, claims: Claims, claim_holder: Holder
) -> None:
    with claim_holder(tmp_path, KEY) as process:
        assert not is_free(claims, KEY)
        assert is_free(claims, OTHER), "each key has a claim of its own"
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "let go\n"
        assert is_free(claims, KEY), "the process still lives, the block has ended"


def test_a_killed_process_holds_nothing(tmp_path: Path, claims: Claims, claim_holder: Holder) -> None:
    with claim_holder(tmp_path, KEY) as process:
        assert not is_free(claims, KEY)
        process.kill()
        process.wait()
        assert is_free(claims, KEY)


def test_an_error_ends_the_claim(tmp_path: Path, claims: Claims, claim_holder: Holder) -> None:
    with pytest.raises(ZeroDivisionError), claims.claim(KEY) as mine:
        assert 1 / (1 - mine)
    with claim_holder(tmp_path, KEY):  # it says that it has the claim
        assert not is_free(claims, KEY)


def test_keys_that_differ_at_the_end_of_the_file_are_told_apart(
    tmp_path: Path, claims: Claims, claim_holder: Holder
) -> None:
    high, higher = "f" * 32, "f" * 14 + "e" + "f" * 17
    with claim_holder(tmp_path, high):
        assert not is_free(claims, high)
        assert is_free(claims, higher)
    assert (tmp_path / ".claims.lock").stat().st_size == 0
