"""Whatever is full or refuses to be written is named, with what to do, and nothing half written stays."""

import contextlib
import errno
import os
import resource

import click
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from vlm_distill_cache.common.errors import ModelError, NoRoomError
from vlm_distill_cache.common.files import atomic
from vlm_distill_cache.common.files.atomic import new_directory, write_bytes_atomic
from vlm_distill_cache.common.files.disk import name_full_disk
from vlm_distill_cache.common.terminal.command_line import CommandGroup
from vlm_distill_cache.data.builtin import build_tokenizer


@contextlib.contextmanager
def files_of_at_most(size: int):
    """No file can grow beyond this, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_weights(path):
    with new_directory(path) as folder:
        save_file({"w": np.zeros(4096, np.float32)}, folder / "model.safetensors")


def save_tokenizer(path):
    with new_directory(path) as folder:
        build_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("write", [save_weights, save_tokenizer, lambda path: write_bytes_atomic(path, bytes(9000))])
def test_a_full_disk_is_named_whoever_writes(write, tmp_path):
    with files_of_at_most(1000), pytest.raises(NoRoomError) as caught:
        write(tmp_path / "it")
    assert str(caught.value).startswith(f"{tmp_path / 'it'}: File too large; raise `ulimit -f`, then run")
    assert list(tmp_path.iterdir()) == []


CODES = [
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOENT, errno.EIO,
]  # fmt: skip


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", ["open", "touch", "fsync", "replace"])
def test_every_refusal_of_a_write_is_a_line_with_name_and_remedy(code: int, step: str, tmp_path, monkeypatch):
    path = tmp_path / "scores.json"

    def refuse(place, *_args, **_options):
        named = [str(place)] if step != "fsync" else []
        raise OSError(code, os.strerror(code), *named)

    monkeypatch.setattr(atomic.os if step == "fsync" else type(path), step, refuse)

    @click.group(cls=CommandGroup)
    def group() -> None: ...

    @group.command()
    def write() -> None:
        write_bytes_atomic(path, b"{}")

    result = CliRunner().invoke(group, ["write"])
    monkeypatch.undo()
    assert result.exit_code == 1
    place = "" if step == "fsync" and code not in CODES[:3] else f"{path}: "
    assert result.output.startswith(f"error: {place}{os.strerror(code)}; ")
    assert result.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_only_quotes_an_error_of_the_system_passes_as_it_is(tmp_path):
    for error in (ModelError("x: cannot be read (os error 28)"), ValueError("no (os error 2)"), OSError("no number")):
        with pytest.raises(type(error)) as caught, name_full_disk(tmp_path):
            raise error
        assert caught.value is error
