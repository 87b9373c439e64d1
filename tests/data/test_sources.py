"""Tar shards and parquet files, local and in stores: the records of the folder they were made of, or a line each."""

import gzip
import io
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet
import pytest

from mixres.data import objects, records
from mixres.data.images import Limits
from mixres.data.scan import Scan, find_records, scan
from mixres.errors import UserError, WorkError
from support.object_stores import (
    ACCESS,
    FaultyServer,
    faulty_server,
    members_of,
    parquet_of,
    s3_server,
    tar_of,
    write_parquet,
)
from support.pairs import PHOTO, write_image, write_pair


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    for number, stem in enumerate("abcdefg"):
        write_pair(root, stem, prompt=f" {number}: 把猫变成蓝色\n")
        write_image(root / f"training_images/{stem}.png", (90, 60 + number))
    return root


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(objects, "PAUSE_S", 0.001)
    with faulty_server() as running:
        yield running


def scanned(source: str | Path, **options: Any) -> Scan:
    return scan([str(source)], limits=Limits(), progress=False, **options)


def facts(found: Scan) -> list[Any]:
    """All that keys are made of."""
    return [(x.record.prompt, x.target_size, x.control_sizes, x.digests) for x in found.records]


def refused(source: str | Path, **options: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        find_records(str(source), **options)
    return [message.replace(f"{source}", "ROOT") for message in caught.value.messages]


def problems_of(source: Path) -> list[str]:
    return [str(problem).replace(f"{source}", "ROOT") for problem in scanned(source).problems]


def test_every_form_and_store_gives_the_records_of_the_folder(
    pairs: Path, tmp_path: Path, server: FaultyServer, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, members = facts(scanned(pairs)), members_of(pairs)
    names = list(members)
    halves = [tar_of({name: members[name] for name in part}) for part in (names[:9], names[9:])]
    (tmp_path / "all.tar").write_bytes(tar_of(members))
    bare = {name.replace(".target.", ".").replace(".control.", ".input."): data for name, data in members.items()}
    (tmp_path / "bare.tar").write_bytes(tar_of(bare))
    parquet_of(pairs, tmp_path / "all.parquet")
    named = {"target": "image", "control": "before", "prompt": "text"}
    parquet_of(pairs, tmp_path / "named.parquet", struct=False, **named)
    for name, value in {**ACCESS, "AWS_ENDPOINT_URL": s3}.items():
        monkeypatch.setenv(name, value)
    for number, half in enumerate(halves):
        server.files[f"/x-{number:03d}.tar"] = half
        fsspec.filesystem("memory").pipe(f"/x-{number}.tar", half)
        fsspec.filesystem("s3").pipe(f"pairs/x/{number}.tar", half)
    fsspec.filesystem("s3").pipe("pairs/all.parquet", (tmp_path / "all.parquet").read_bytes())
    sources: dict[str, dict[str, str]] = {
        f"{tmp_path}/all.tar": {},
        f"{tmp_path}/bare.tar": {"control": "input"},
        f"{tmp_path}/all.parquet": {},
        f"{tmp_path}/n*d.parquet": named,
        f"{server.url}/x-{{000..001}}.tar": {},
        "memory://x-?.tar": {},
        "s3://pairs/x/*.tar": {},
        "s3://pairs/all.parquet": {},
    }
    for source, columns in sources.items():
        found = scanned(source, columns=columns)
        assert (facts(found), found.problems) == (wanted, []), source
        image = found.records[0].record.target
        assert image.read_bytes() == members[names[0]], "and it can be opened again"


def test_a_scan_reads_headers_in_ranges_and_an_unchanged_shard_never_again(
    server: FaultyServer, tmp_path: Path
) -> None:
    """An index and digests are kept; a shard that changed is read anew."""
    image = io.BytesIO()
    PHOTO.resize((900, 600)).save(image, "BMP")
    members = {f"{i}.{name}": data for i in range(3) for name, data in (("bmp", image.getvalue()), ("txt", b"x"))}
    server.files["/x.tar"] = tar_of(members)
    memo = tmp_path / "scan"
    assert len(find_records(f"{server.url}/x.tar")[0]) == 3
    assert sum(count for _, count in server.served) < 4 * 2**16 < len(server.files["/x.tar"]) / 10
    first = scanned(f"{server.url}/x.tar", memo=memo)
    server.served.clear()
    second = scanned(f"{server.url}/x.tar", memo=memo)
    assert (facts(second), second.decoded, server.served) == (facts(first), 0, [("HEAD", 0)])
    server.files["/x.tar"] = tar_of({**members, "3.bmp": image.getvalue(), "3.txt": b"y"})
    third = scanned(f"{server.url}/x.tar", memo=memo)
    assert (len(third.records), third.decoded) == (4, 4)


@pytest.mark.parametrize("source", ["s3://pairs/x.tar", "s3://pairs/x.parquet", "http/x.parquet"])
def test_a_second_start_reads_no_byte_of_an_unchanged_object(
    source: str, pairs: Path, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**ACCESS, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    table = parquet_of(pairs, tmp_path / "x.parquet")
    rows = pyarrow.parquet.read_table(table).to_pydict()
    rows["mask"] = [None, *rows["target"][1:]]  # of such a column statistics do not tell which rows have one
    data = {"x.tar": tar_of(members_of(pairs)), "x.parquet": write_parquet(table, rows).read_bytes()}
    where = source.replace("http", server.url) if source.startswith("http") else source
    server.files |= {f"{folder}/{name}": value for folder in ("", "/pairs") for name, value in data.items()}
    first = scanned(where, memo=tmp_path / "memo")
    assert sum(count for _, count in server.served) > len(data[source.rpartition("/")[2]]) / 2
    server.served.clear()
    second = scanned(where, memo=tmp_path / "memo")
    assert (facts(second), second.problems, second.decoded) == (facts(first), first.problems, 0)
    assert len(server.served) <= 2 and {method for method, _ in server.served} == {"HEAD"}, server.served
    fsspec.filesystem("s3").clear_instance_cache()


def _linked() -> bytes:
    buffer = io.BytesIO(tar_of({"a.jpg": b"x", "a.txt": b"x"}))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        entry = tarfile.TarInfo("a.mask.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    return buffer.getvalue()


_GOOD = tar_of({"a.png": b"x" * 600, "a.txt": b"x", "b.png": b"x", "b.txt": b"x"})
_TARS = {
    "link": (_linked(), "ROOT:a: a.mask.png: is a link, or no regular file; put the file itself there"),
    "parent": (tar_of({"../a.png": b"x"}), "ROOT:../a: ../a.png: leads out of the archive; rename it"),
    "absolute": (tar_of({"/a.png": b"x"}), "ROOT:/a: /a.png: leads out of the archive; rename it"),
    "twice": (tar_of({"a.png": b"x", "a.target.jpg": b"x"}), "ROOT:a: has several members for 'path_target'"),
    "unknown": (tar_of({"a.png": b"x", "a.controll.png": b"x"}), "ROOT:a: a.controll.png: 'controll' is no known"),
    "no target": (tar_of({"a.txt": b"x"}), "ROOT:a: has no 'path_target'; add it"),
    "gap": (tar_of({"a.png": b"x", "a.control_1.png": b"x", "a.txt": b"x"}), "ROOT:a: has no 'path_control'; add it"),
    "caption": (tar_of({"a.png": b"x", "a.txt": b"\xff"}), "ROOT:a: the caption is not UTF-8; save it as UTF-8"),
    "no prompt": (tar_of({"a.png": b"x"}), "ROOT:a: has no prompt; write one, or set data.empty_caption"),
    "image": (tar_of({"a.png": b"x", "a.txt": b"x"}), "ROOT:a.png: is not an image in a supported format"),
    "cut inside": (_GOOD[:1000], "ROOT: is damaged, its headers do not read: unexpected end of data; copy it again"),
    "cut between": (_GOOD[:1536], "ROOT: is cut, it has no end mark; copy it again"),
    "header": (_GOOD[:1540] + b"?" * 400 + _GOOD[1940:], "ROOT: is damaged at byte 1536: no header is there"),
    "two in one": (_GOOD + _GOOD, "ROOT: is damaged at byte 4608: no header is there, and more follows; copy it"),
    "zeros": (bytes(20480), "ROOT: holds no record; copy it again, or take it out"),
    "no tar": (b"<html>" * 200, "ROOT: is damaged, its headers do not read"),
}


@pytest.mark.parametrize("name", _TARS)
def test_a_damaged_shard_or_member_is_named(name: str, tmp_path: Path) -> None:
    data, line = _TARS[name]
    file = tmp_path / "x.tar"
    file.write_bytes(data)
    problems = problems_of(file)
    assert len(problems) == 1 and problems[0].startswith(line), problems
    assert scanned(file).unusable == 1


def test_a_compressed_shard_is_refused_with_the_command_that_unpacks_it(tmp_path: Path) -> None:
    for name in ("x.tar", "x.tar.gz"):
        (tmp_path / name).write_bytes(gzip.compress(_GOOD))
        (message,) = refused(tmp_path / name)
        assert message.startswith("ROOT: is compressed; ") and message.endswith("unpack it with gzip -d")


def test_a_damaged_parquet_file_or_row_is_named(pairs: Path, tmp_path: Path) -> None:
    file = parquet_of(pairs, tmp_path / "x.parquet")
    data = file.read_bytes()
    image = (pairs / "training_images/a.png").read_bytes()
    rows: dict[str, list[Any]] = {
        "target": [{"bytes": image, "path": None}, None, {"bytes": None, "path": "http://elsewhere"}],
        "prompt": ["x", "x", "x"],
    }
    write_parquet(file, rows)
    assert problems_of(file) == [
        "ROOT:1: has no 'path_target'; add it",
        "ROOT:2:target: the row does not hold the bytes of its image; write the file with its images in it",
    ]
    rows["control"], rows["target"] = [{"bytes": None, "path": "a.png"}] * 3, [{"bytes": image, "path": None}] * 3
    write_parquet(file, rows)
    without = "the row does not hold the bytes of its image; write the file with its images in it"
    assert problems_of(file) == [f"ROOT:{row}:control: {without} (belongs to ROOT:{row})" for row in range(3)]
    file.write_bytes(data[:-100])
    (problem,) = problems_of(file)
    assert problem.startswith("ROOT: does not read: ")
    file.write_bytes(data[:4] + b"\0" * 1000 + data[1004:])
    problems = problems_of(file)
    assert len(problems) == 2 * 3 and all("its row group does not read" in problem for problem in problems), problems
    write_parquet(file, {"path_target": [image], "target": [image], "prompt": ["x"]})
    assert refused(file)[0].startswith("ROOT: has two columns for 'path_target', 'path_target' is one")
    write_parquet(file, {"target": ["a.png"], "prompt": ["x"]})
    assert refused(file)[0].startswith("ROOT: the column 'target' holds string, not images; ")
    write_parquet(file, {"image": [image], "prompt": ["x"]})
    assert refused(file)[0].endswith("(columns: image, prompt; name them in data.columns)")
    assert refused(file, columns={"mask": "maks"})[0].startswith("ROOT: has no column 'maks', which data.columns names")


def test_a_store_that_fails_for_a_while_is_asked_again(pairs: Path, server: FaultyServer) -> None:
    server.files["/x.tar"], wanted = tar_of(members_of(pairs)), facts(scanned(pairs))
    for faults in ([503, 503, "reset", 503], ["reset"] * 4, [None, "cut", 429, 500]):
        server.faults = list(faults)
        assert facts(scanned(f"{server.url}/x.tar")) == wanted


def test_a_glob_over_http_asks_for_each_size_and_a_range_counts_up(pairs: Path, server: FaultyServer) -> None:
    server.files["/d/x.tar"], wanted = tar_of(members_of(pairs)), facts(scanned(pairs))
    server.files["/d/"] = b'<a href="x.tar">x</a> <a href="y.txt">y</a>'
    assert facts(scanned(f"{server.url}/d/*.tar")) == wanted
    assert refused(f"{server.url}/d/{{5..1}}.tar") == ["ROOT: {5..1} counts down: write {1..5}"]


def test_a_store_that_keeps_failing_ends_the_work_with_one_line(
    pairs: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is skipped for it: the data are not at fault."""
    server.files["/x.tar"] = tar_of(members_of(pairs))
    url = f"{server.url}/x.tar"
    image = find_records(url)[0][0].target
    reasons: list[tuple[int | str, str]] = [
        (503, "cannot be read after 5 tries: 503"),
        ("reset", "cannot be read after 5 tries: "),
        (403, "may not be read: access is refused, or credentials are missing or have expired; renew"),
        ("slow", "cannot be read after 2 tries: "),
    ]
    for fault, line in reasons:
        if fault == "slow":
            monkeypatch.setattr(objects, "TRIES", 2)
            monkeypatch.setattr(objects, "TIMEOUT_S", 0.1)
        server.faults = [fault] * 20
        with pytest.raises(WorkError) as caught:
            image.read_bytes()
        assert str(caught.value).startswith(f"{url}: {line}"), caught.value
        server.faults = [fault] * 20
        with pytest.raises(UserError if fault == 403 else WorkError):
            scanned(url)
    server.faults = []


def test_what_was_scanned_before_a_store_went_away_is_not_read_again(
    pairs: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.files["/x.tar"], memo = tar_of(members_of(pairs)), tmp_path / "scan"
    total = scanned(f"{server.url}/x.tar").decoded
    server.served.clear()
    find_records(f"{server.url}/x.tar")
    server.faults = [*[None] * (len(server.served) + total // 2), *[403] * 20]
    with pytest.raises(WorkError, match="may not be read"):
        scanned(f"{server.url}/x.tar", memo=memo)
    server.faults = []
    assert 0 < scanned(f"{server.url}/x.tar", memo=memo).decoded <= total - total // 2 < total


def test_an_object_that_changed_since_it_was_listed_is_named(pairs: Path, server: FaultyServer) -> None:
    server.files["/x.tar"] = tar_of(members_of(pairs))
    image = find_records(f"{server.url}/x.tar")[0][-1].target
    server.files["/x.tar"] = server.files["/x.tar"][:1000]
    with pytest.raises(WorkError, match=r"/x\.tar: has changed since it was listed, or its server serves no ranges"):
        image.read_bytes()
    assert refused(f"{server.url}/none.tar") == ["ROOT: there is no such object; correct it"]


def test_faults_of_s3_are_retried_and_expired_credentials_named_without_them(
    pairs: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**ACCESS, "AWS_ENDPOINT_URL": server.url, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    server.files["/pairs/x.tar"] = tar_of(members_of(pairs))
    server.faults = [None, "reset", "cut", None, "cut"]
    assert facts(scanned("s3://pairs/x.tar")) == facts(scanned(pairs)) and not server.faults
    server.faults = [None, None, None, *[403] * 20]
    with pytest.raises(UserError, match=r"^s3://pairs/x\.tar: may not be read: "):  # it may be listed alone
        scanned("s3://pairs/x.tar")
    server.faults = [403] * 20
    (message,) = refused("s3://pairs/x.tar")
    assert message.startswith("ROOT: may not be read: access is refused") and "AWS_PROFILE" in message
    assert ACCESS["AWS_SECRET_ACCESS_KEY"] not in message
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_glob_follows_links_and_names_what_is_no_file(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the Hub's cache holds links alone."""
    members = members_of(pairs)
    (tmp_path / "there").mkdir()
    for number, name in enumerate(("there/x.tar", "a.tar")):
        part = list(members)[9 * number : 9 * number + 9]
        (tmp_path / name).write_bytes(tar_of({key: members[key] for key in part}))
    (tmp_path / "b.tar").symlink_to("there/x.tar")
    (tmp_path / "folder.tar").mkdir()
    found = scanned(f"{tmp_path}/*.tar")
    assert len(found.records) == 6 and facts(found)[3:] == facts(scanned(tmp_path / "there/x.tar"))
    (tmp_path / "c.tar").symlink_to("gone.tar")
    os.mkfifo(tmp_path / "d.tar")
    with pytest.raises(UserError) as caught:
        find_records(f"{tmp_path}/*.tar")
    assert caught.value.messages == (
        f"{tmp_path}/c.tar: is a link that leads nowhere; correct it",
        f"{tmp_path}/d.tar: is no regular file; take it out",
    )
    assert refused(f"{tmp_path}/fo*.tar") == ["ROOT: names no file; correct it"]
    monkeypatch.setattr(objects.os, "access", lambda *_: False)
    assert refused(f"{tmp_path}/a.tar") == ["ROOT: may not be read: access is refused; change its permissions"]


def test_limits_hold_for_images_of_a_table_that_are_remembered(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many bytes one has is not known before it is read."""
    monkeypatch.setattr(records, "SETTLED_NS", -(10**12))
    parquet_of(pairs, tmp_path / "x.parquet")
    sizes = sorted(path.stat().st_size for path in pairs.rglob("*.png"))
    limits = Limits(max_bytes=sizes[len(sizes) // 2])
    how: dict[str, Any] = {"progress": False, "memo": tmp_path / "scan"}
    first, tight, again = (scan([f"{tmp_path}/x.parquet"], limits=x, **how) for x in (Limits(), limits, limits))
    fresh = scan([f"{tmp_path}/x.parquet"], limits=limits, progress=False)
    assert tight[:2] == again[:2] == fresh[:2] and fresh.problems and len(first.records) == 7
    assert scan([f"{tmp_path}/x.parquet"], limits=Limits(), **how).decoded == 0


def test_a_damaged_index_of_a_shard_counts_as_none(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one byte of a prompt may come from it."""
    monkeypatch.setattr(records, "SETTLED_NS", -(10**12))
    (tmp_path / "x.tar").write_bytes(
        tar_of({key: b"swap" if key.endswith("txt") else data for key, data in members_of(pairs).items()})
    )
    first = find_records(f"{tmp_path}/x.tar", index=tmp_path / "index")
    (file,) = (tmp_path / "index").iterdir()
    whole = file.read_bytes()
    for data in (whole.replace(b"swap", b"swep", 1), whole[:-1], whole[:8], b"", b"\0" * len(whole)):
        assert data != whole
        file.write_bytes(data)
        assert find_records(f"{tmp_path}/x.tar", index=tmp_path / "index") == first
        assert file.read_bytes() == whole


def test_a_missing_package_is_named_with_its_extra(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet_of(pairs, tmp_path / "x.parquet")
    for module, extra, source in (
        ("aiohttp", "http", "https://x/x.tar"),
        ("gcsfs", "gcs", "gs://x/x.tar"),
        ("pyarrow", "parquet", f"{tmp_path}/x.parquet"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            (message,) = refused(source)
            assert f"'{module}' is not installed" in message and message.endswith(f"pip install 'mixres[{extra}]'")
    assert refused("ftp://x/x.tar")[0].startswith("ROOT: is no URL that is read; write one of: s3, gs, hf, https")
    assert refused("s3://pairs/folder")[0].startswith("ROOT: a URL names .tar or .parquet files")
