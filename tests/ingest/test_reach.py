"""Laws of reach: what a source may open, and how much of it."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import random
import socket

import pyarrow as pa
import pytest
from servers import web  # noqa: F401 - a fixture

from aifactory.errors import ConfigError
from aifactory.ingest.reach import (
    MIN_UNPACKED_BYTES,
    ArchiveTooLargeError,
    BlockReader,
    check_address,
    check_uri,
    download,
    open_inside,
    packing_of,
    unpack,
)

LINES = b"".join(b"line %d of some text\n" % i for i in range(200_000))
PACKERS = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "zstd": lambda data: pa.compress(data, "zstd", asbytes=True),
}


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_inside_the_root_is_opened_and_one_outside_is_not(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "inside").write_text("beside, its name begins as the root's")
    (tmp_path / "in" / "a.txt").write_text("a")
    os.symlink(tmp_path / "in" / "a.txt", tmp_path / "in" / "again.txt")
    os.symlink(tmp_path / "inside", tmp_path / "in" / "leak.txt")
    root = os.path.realpath(tmp_path / "in")

    for name in ("a.txt", "again.txt"):
        with open_inside(tmp_path / "in" / name, root) as file:
            assert file.read() == b"a"
    for path in ("in/leak.txt", "inside", "in/../inside"):
        with pytest.raises(OSError, match="outside"):
            open_inside(tmp_path / path, root)


def test_a_folder_on_the_way_that_is_swapped_for_a_link_leads_nowhere(tmp_path):
    (tmp_path / "root" / "folder").mkdir(parents=True)
    (tmp_path / "root" / "folder" / "a.txt").write_text("a")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.txt").write_text("secret")
    os.rename(tmp_path / "root" / "folder", tmp_path / "gone")
    os.symlink(tmp_path / "secret", tmp_path / "root" / "folder")

    with pytest.raises(OSError, match="outside"):
        open_inside(tmp_path / "root" / "folder" / "a.txt", os.path.realpath(tmp_path / "root"))


def test_a_fifo_a_device_and_a_socket_are_refused_at_once(tmp_path, monkeypatch):
    root = os.path.realpath(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # the name of a socket is short
        listener.bind("socket")
        for name in ("fifo", "socket", "."):
            with pytest.raises(OSError, match=r"regular|No such device"):
                open_inside(tmp_path / name, root)
    with pytest.raises(OSError, match="regular"):
        open_inside("/dev/null", "/dev/null")


# ── addresses ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)
def test_an_address_that_is_not_public_needs_permission(address):
    def resolve(host, port):
        return ["8.8.8.8", address]  # one that is not public is enough

    with pytest.raises(ConfigError, match=r"'docs'.*allow_private"):
        check_address("example.org", 443, source="docs", allow_private=False, resolve=resolve)
    assert check_address("example.org", 443, source="docs", allow_private=True, resolve=resolve) == ["8.8.8.8", address]


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_a_public_address_needs_none(address):
    found = check_address("example.org", 443, source="docs", allow_private=False, resolve=lambda *_: [address])
    assert found == [address]


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f000001"])
def test_other_names_of_loopback_are_seen_through(host):
    with pytest.raises(ConfigError, match="'docs'"):
        check_address(host, 80, source="docs", allow_private=False)


@pytest.mark.parametrize(
    "uri",
    [
        "simplecache::https://example.org/a",
        "zip://a::s3://bucket/b",
        "local:///etc/passwd",
        "memory://a",
        "reference://a",
        "github://a:b@/c",
        "hdfs://127.0.0.1:8020/a",
        "sftp://localhost/a",
    ],
)
def test_a_uri_that_leads_elsewhere_is_refused(uri):
    with pytest.raises(ConfigError, match="'docs'"):
        check_uri(uri, source="docs", allow_private=False)


def test_the_endpoint_of_an_object_store_is_an_address_too():
    check_uri("s3://bucket/a", source="docs", allow_private=False)
    for endpoint in ("127.0.0.1:9000", "http://localhost:9000", "http://[::1]:9000", "169.254.169.254"):
        with pytest.raises(ConfigError, match="allow_private"):
            check_uri("s3://bucket/a", source="docs", allow_private=False, endpoint=endpoint)
        check_uri("s3://bucket/a", source="docs", allow_private=True, endpoint=endpoint)


# ── https ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def get(url, *, allow_private=True, **options):
    return download(url, source="docs", allow_private=allow_private, **{"max_bytes": 1_000_000, **options})


def test_a_page_is_read_and_its_stamp_saves_reading_it_again(web):  # noqa: F811
    web.pages = {"/a": (200, {"ETag": '"1"'}, b"content"), "/b": (302, {"Location": "/a"}, b"")}

    page = get(web.url + "/b")
    with page.file as file:
        assert file.read() == b"content"
    assert get(web.url + "/a", known_stamp=page.stamp).file is None
    web.pages["/a"] = (200, {"ETag": '"2"'}, b"content")
    assert get(web.url + "/a", known_stamp=page.stamp).file is not None


def test_a_private_page_needs_permission_and_is_not_asked_for(web):  # noqa: F811
    with pytest.raises(ConfigError, match="allow_private"):
        get(web.url + "/a", allow_private=False)
    assert not web.asked


def test_a_redirect_into_the_private_net_is_refused(web):  # noqa: F811
    web.pages = {"/a": (302, {"Location": "http://169.254.169.254/latest/meta-data"}, b"")}

    with pytest.raises(ConfigError, match=r"169\.254\.169\.254"):
        hop(web)


def hop(web):  # noqa: F811
    """A download that may open loopback, where the test's server is, and nothing else that is private."""
    import aifactory.ingest.reach as reach

    is_public = reach._is_public
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reach, "_is_public", lambda address: address == "127.0.0.1" or is_public(address))
        get(web.url + "/a", allow_private=False)


def test_a_name_is_resolved_once_so_it_can_not_be_answered_twice(web):  # noqa: F811
    web.pages = {"/a": (200, {}, b"content")}
    answers = iter([["127.0.0.1"], ["169.254.169.254"]])

    page = get(web.url.replace("127.0.0.1", "rebind.example") + "/a", resolve=lambda *_: next(answers))

    assert page.file.read() == b"content"
    assert next(answers) == ["169.254.169.254"]


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ((302, {"Location": "/a"}, b""), "redirects"),
        ((302, {"Location": "file:///etc/passwd"}, b""), "http"),
        ((302, {}, b""), "redirects"),
        ((404, {}, b""), "404"),
        ((500, {}, b"x"), "500"),
        ((200, {}, b"x" * 1001), "1000 bytes"),
    ],
)
def test_what_is_no_page_is_an_error_that_says_why(web, page, expected):  # noqa: F811
    web.pages = {"/a": page}

    with pytest.raises(ConfigError, match=expected):
        get(web.url + "/a", max_bytes=1000)


def test_a_page_that_ends_early_is_an_error(web):  # noqa: F811
    web.pages = {"/a": (200, {"Content-Length": "100"}, b"only this")}

    with pytest.raises(OSError, match=r"91 bytes|IncompleteRead"):
        get(web.url + "/a")


def test_no_secret_of_a_url_is_in_a_message(web):  # noqa: F811
    url = web.url.replace("http://", "http://user:hunter2@") + "/a?token=hunter2"

    with pytest.raises(ConfigError) as caught:
        get(url)
    assert "hunter2" not in str(caught.value)


# ── archives ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def unpacked(data, packing, **options):
    """What came, and the error that ended it."""
    limits = {"packed_bytes": len(data), "max_ratio": 100, "max_unpacked_bytes": 10**9, **options}
    blocks = []
    try:
        blocks.extend(unpack(io.BytesIO(data), packing, **limits))
    except Exception as error:
        return b"".join(blocks), error
    return b"".join(blocks), None


@pytest.mark.parametrize("packing", PACKERS)
def test_what_was_packed_comes_out_and_members_follow_one_another(packing):
    packed = PACKERS[packing](LINES)

    assert unpacked(packed, packing) == (LINES, None)
    assert unpacked(packed + packed, packing) == (LINES + LINES, None)
    assert unpacked(b"", packing) == (b"", None)


@pytest.mark.parametrize("packing", PACKERS)
def test_a_bomb_is_stopped_at_its_ratio(packing):
    bomb = PACKERS[packing](bytes(100_000_000))
    allowed = max(MIN_UNPACKED_BYTES, 50 * len(bomb))

    data, error = unpacked(bomb, packing, max_ratio=50)

    assert isinstance(error, ArchiveTooLargeError)
    assert len(data) <= allowed
    assert error.ratio > 50


@pytest.mark.parametrize("packing", PACKERS)
def test_a_bomb_is_stopped_at_its_size(packing):
    data, error = unpacked(PACKERS[packing](LINES), packing, max_unpacked_bytes=3_000_000)

    assert isinstance(error, ArchiveTooLargeError)
    assert len(data) <= 3_000_000


@pytest.mark.parametrize("packing", PACKERS)
def test_a_short_text_of_equal_lines_is_no_bomb(packing):
    assert unpacked(PACKERS[packing](b"a\n" * 400_000), packing) == (b"a\n" * 400_000, None)


@pytest.mark.parametrize("packing", PACKERS)
def test_a_damaged_archive_gives_what_comes_before_and_an_error(packing):
    packed = PACKERS[packing](random.Random(1).randbytes(5_000_000))

    for broken in (packed[: len(packed) // 2], packed + b"garbage", b"no archive", packed[:5]):
        data, error = unpacked(broken, packing)
        assert error is not None
        assert not isinstance(error, ArchiveTooLargeError)
        assert len(data) <= 5_000_000


def test_an_archive_is_known_by_its_name():
    names = {"a.jsonl.gz": "gzip", "a.zst": "zstd", "a.ZSTD": "zstd", "a.bz2": "bz2", "a.gzip": None, "gz": None}
    assert {name: packing_of(name) for name in names} == names


def test_blocks_read_as_a_file():
    rng = random.Random(2)
    data = rng.randbytes(10_000)
    blocks = [data[i : i + 700] for i in range(0, len(data), 700)] + [b""]
    reader = BlockReader(iter(blocks))

    parts = []
    while part := reader.read(rng.randrange(1, 2000)):
        parts.append(part)
    assert b"".join(parts) == data
    assert all(len(part) > 0 for part in parts)
    assert BlockReader(iter(blocks)).read() == data
