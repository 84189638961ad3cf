"""Archives that somebody else made, also those made to do harm."""

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora_squeeze.errors import FetchError
from lora_squeeze.formats import unpacking
from lora_squeeze.formats.unpacking import unpack

MB = 10**6
CORPUS = Path(__file__).parent / "archives"


def tar_bytes(*members: tuple[tarfile.TarInfo | str, bytes], mode: str = "w", **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, **options) as archive:
        for info, content in members:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
            info.size = info.size or len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zip_bytes(*members: tuple[zipfile.ZipInfo | str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in members:
            archive.writestr(info, content)
    return file.getvalue()


def odd(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def unpacked(content: bytes, tmp_path: Path, *, limit: int = MB) -> dict[str, bytes]:
    archive, folder = tmp_path / "archive", tmp_path / "inner" / "files"
    archive.write_bytes(content)
    folder.mkdir(parents=True)
    unpack(archive, folder, origin="here", limit=limit)
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def nothing_outside(tmp_path: Path) -> bool:
    """Nothing lies beside the archive and the folder, and nothing in the folder is other than a file or a folder."""
    beside = {
        str(one.relative_to(tmp_path))
        for one in tmp_path.rglob("*")
        if (tmp_path / "inner" / "files") not in one.parents
    }
    kinds = {stat.S_IFMT(one.lstat().st_mode) for one in tmp_path.rglob("*")}
    return beside <= {"archive", "inner", "inner/files"} and kinds <= {stat.S_IFREG, stat.S_IFDIR}


FILES = (("adapter_config.json", b"{}"), ("sub/folder/weights", b"\0" * 5000), ("./dotted/name", b"x"), ("empty", b""))
WANTED = {name.removeprefix("./"): content for name, content in FILES}


@pytest.mark.parametrize(
    "content",
    [
        tar_bytes(*FILES),
        tar_bytes(*FILES, mode="w:gz"),
        tar_bytes(*FILES, format=tarfile.PAX_FORMAT),
        tar_bytes(*FILES, format=tarfile.USTAR_FORMAT),
        zip_bytes(*FILES),
        tar_bytes((odd("./", tarfile.DIRTYPE), b""), (odd("sub/", tarfile.DIRTYPE), b""), *FILES),
    ],
    ids=["tar", "tar.gz", "pax", "ustar", "zip", "folders"],
)
def test_archives_are_unpacked(content, tmp_path):
    assert unpacked(content, tmp_path) == WANTED


def test_long_and_foreign_names(tmp_path):
    files = {"/".join(["deep" * 20] * 5): b"1", "naïve—名.json": b"2"}
    assert unpacked(tar_bytes(*files.items()), tmp_path) == files


def test_rights_are_not_taken_over(tmp_path):
    info = tarfile.TarInfo("program")
    info.mode, info.uid = 0o6777, 0
    unpacked(tar_bytes((info, b"x")), tmp_path)
    mode = (tmp_path / "inner" / "files" / "program").stat().st_mode
    assert mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IXUSR) == 0


NAMES = [
    "../escaped",
    "a/../../escaped",
    "/escaped",
    "a//b",
    "..",
    "C:\\escaped",
    "..\\escaped",
    "a\x00b"[:1] + "\nb",
    "x" * 300,
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [tar_bytes, zip_bytes], ids=["tar", "zip"])
def test_names_that_lead_elsewhere(make, name, tmp_path):
    with pytest.raises(FetchError, match=r"here: holds a file named .* would not lie inside its own folder"):
        unpacked(make(("good", b"x"), (name, b"y")), tmp_path)
    assert nothing_outside(tmp_path)


@pytest.mark.parametrize(
    ("info", "what"),
    [
        (odd("link", tarfile.SYMTYPE, "/etc/passwd"), "symbolic link"),
        (odd("link", tarfile.LNKTYPE, "good"), "hard link"),
        (odd("pipe", tarfile.FIFOTYPE), "named pipe"),
        (odd("disk", tarfile.BLKTYPE), "device"),
        (odd("tty", tarfile.CHRTYPE), "device"),
        (odd("holes", tarfile.GNUTYPE_SPARSE), "sparse file"),
        (odd("what", b"Z"), "member of an unknown kind"),
    ],
)
def test_what_is_neither_file_nor_folder(info, what, tmp_path):
    with pytest.raises(FetchError, match=f"here: the archive holds a {what}"):
        unpacked(tar_bytes(("good", b"x"), (info, b"")), tmp_path)
    assert nothing_outside(tmp_path)


def test_a_link_in_a_zip(tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(FetchError, match="holds a symbolic link"):
        unpacked(zip_bytes((info, b"/etc/passwd")), tmp_path)
    assert nothing_outside(tmp_path)


def test_a_file_written_through_a_link_of_the_same_name(tmp_path):
    link = odd("sub", tarfile.SYMTYPE, "..")
    with pytest.raises(FetchError, match="symbolic link"):
        unpacked(tar_bytes((link, b""), ("sub/escaped", b"x")), tmp_path)
    assert nothing_outside(tmp_path)


@pytest.mark.parametrize(
    "members",
    [(("a", b"1"), ("a", b"2")), (("a", b"1"), ("a/b", b"2")), (("a/b", b"1"), ("a", b"2"))],
    ids=["twice", "file, then folder", "folder, then file"],
)
def test_names_that_clash(members, tmp_path):
    with pytest.raises(FetchError, match=r"twice|as a file and as a folder"):
        unpacked(tar_bytes(*members), tmp_path)


def test_a_bomb_of_zeros(tmp_path):
    bomb = tar_bytes(("zeros", bytes(50 * MB)), mode="w:gz")
    assert len(bomb) < MB
    with pytest.raises(FetchError, match=r"what the archive unpacks to: .* is more than the 1.0 MB"):
        unpacked(bomb, tmp_path)
    assert sum(file.stat().st_size for file in (tmp_path / "inner").rglob("*") if file.is_file()) <= MB


def test_a_bomb_in_a_zip_that_lies_about_its_size(tmp_path):
    content = bytearray(zip_bytes(("zeros", bytes(50 * MB))))
    at = content.index(b"PK\x01\x02")
    struct.pack_into("<I", content, at + 24, 10)  # the size in the directory
    with pytest.raises(FetchError):
        unpacked(bytes(content), tmp_path)
    assert sum(file.stat().st_size for file in (tmp_path / "inner").rglob("*") if file.is_file()) <= MB


def test_a_header_that_would_fill_the_memory(tmp_path):
    info = tarfile.TarInfo("name")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 40 * 10**9
    content = gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_000))
    with pytest.raises(FetchError, match="a header says that it is 40000000000 bytes long"):
        unpacked(content, tmp_path)


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "MAX_MEMBERS", 10)
    with pytest.raises(FetchError, match="more than 10 members"):
        unpacked(tar_bytes(*((str(number), b"") for number in range(11))), tmp_path)


def test_endless_headers(tmp_path):
    header = odd("pax", tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT)
    with pytest.raises(FetchError):
        unpacked(header * 5000, tmp_path)


@pytest.mark.parametrize(
    "content", [tar_bytes(*FILES), tar_bytes(*FILES, mode="w:gz"), zip_bytes(*FILES)], ids=["tar", "gz", "zip"]
)
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 0.95])
def test_what_is_cut_off(content, share, tmp_path):
    if tarfile.is_tarfile(io.BytesIO(content)) and not content.startswith(b"\x1f"):
        content = content[: -len(content) + len(content.rstrip(b"\0"))] + bytes(512)  # tar pads its end
    with pytest.raises(FetchError, match=r"damaged|not a tar"):
        unpacked(content[: int(len(content) * share)], tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>", b"PK\x03\x04nonsense", b"\x1f\x8bnonsense"])
def test_what_is_no_archive(content, tmp_path):
    with pytest.raises(FetchError):
        unpacked(content, tmp_path)


def test_an_encrypted_zip(tmp_path):
    content = bytearray(zip_bytes(("a", b"secret")))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + offset] |= 1
    with pytest.raises(FetchError, match=r"cannot be unpacked: .*encrypted"):
        unpacked(bytes(content), tmp_path)


# --- whatever comes ---------------------------------------------------------------------------------------------

ARCHIVES = [tar_bytes(*FILES), tar_bytes(*FILES, mode="w:gz", compresslevel=0), zip_bytes(*FILES)]


def survives(content: bytes, tmp_path: Path) -> None:
    """It is unpacked within its folder and its limit, or refused in words; nothing else may happen."""
    place = tmp_path / os.urandom(8).hex()
    place.mkdir()
    try:
        files = unpacked(content, place, limit=100_000)
    except FetchError:
        files = {}
    assert sum(map(len, files.values())) <= 100_000
    assert nothing_outside(place)


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*")), ids=lambda file: file.name)
def test_the_corpus(file, tmp_path):
    survives(file.read_bytes(), tmp_path)
    if file.name.startswith("sound"):
        assert unpacked(file.read_bytes(), tmp_path) == {"adapter_config.json": b"{}", "weights": bytes(100)}
    else:
        with pytest.raises(FetchError):
            unpacked(file.read_bytes(), tmp_path, limit=10 * MB)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from(ARCHIVES),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=12)), max_size=6),
    kept=st.floats(0.2, 1),
)
@example(base=ARCHIVES[0], changes=[(0.0, b"../")], kept=1.0)
def test_archives_with_bytes_changed(base, changes, kept, tmp_path):
    content = bytearray(base)
    for place, new in changes:
        start = int(place * len(content))
        content[start : start + len(new)] = new
    survives(bytes(content[: int(kept * len(content))]), tmp_path)


members = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(["a", "a/b", "../a", "/a", ".", "a/../b", "./a", "b"]), st.text(min_size=1, max_size=20)
        ),
        st.sampled_from(
            [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"\0", b"7"]
        ),
        st.sampled_from(["", "a", "..", "/etc/passwd"]),
        st.integers(0, 3000),
    ),
    max_size=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=members, form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), packed=st.booleans())
def test_archives_of_any_members(members, form, packed, tmp_path):
    made = tar_bytes(
        *((odd(name, kind, target), bytes(size)) for name, kind, target, size in members),
        mode="w:gz" if packed else "w",
        format=form,
        errors="surrogateescape",
    )
    survives(made, tmp_path)
