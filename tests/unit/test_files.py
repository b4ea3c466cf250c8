"""`replacing` and `write_text` write atomically, honour the umask and leave no temporary file."""

import os
import stat
from pathlib import Path

import pytest

from commonit_trl.files import replacing, write_text


@pytest.fixture
def umask():
    """Set a umask other than the usual one."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("writer", ["write_text", "another"])
def test_writing_leaves_one_file_and_honours_the_umask(writer: str, tmp_path: Path, umask: int) -> None:
    path = tmp_path / "file"
    if writer == "write_text":
        write_text(path, "äöü ✓")
    else:
        with replacing(path) as temporary:
            temporary.write_bytes("äöü ✓".encode())
            temporary.chmod(0o600)  # as safetensors does
    assert path.read_bytes() == "äöü ✓".encode()
    assert list(tmp_path.iterdir()) == [path]
    assert mode_of(path) == 0o666 & ~umask


def test_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o600)
    write_text(path, "new")
    assert (path.read_text(), mode_of(path)) == ("new", 0o600)


@pytest.mark.parametrize("before", [None, "old"], ids=["new", "replaced"])
def test_failed_write_leaves_the_old_file(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of")
        raise KeyboardInterrupt
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({} if before is None else {"file": before})


def test_readers_see_the_old_file_until_the_write_completes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with path.open() as reader:
        with replacing(path) as temporary:
            temporary.write_text("half of")
            assert path.read_text() == "old"
            temporary.write_text("new")
        assert (reader.read(), path.read_text()) == ("old", "new")


def test_write_follows_symbolic_links(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_text(link, "text")
    assert link.is_symlink() and target.read_text() == "text"


def test_write_to_a_pipe(tmp_path: Path) -> None:
    """`--html /dev/stdout` must not be replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 99) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", ["missing/file", "."], ids=["no directory", "a directory"])
def test_error_names_the_target_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(OSError) as error:
        write_text(path, "text")
    assert error.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
