"""What a WebDataset shard promises to tools that know nothing of us, and what it refuses."""

import io
import json
import tarfile

import numpy as np
import pytest
import safetensors.numpy
from cache_factory import assert_equal_records, make_record, sample_id
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.zstd import Zstd
from test_stores import ORDINARY, StoreContract, read_all, write

from vlm_distill_cache.common.cache.stores import finish_shard
from vlm_distill_cache.common.cache.stores.webdataset_store import EXTENSION, decode_member, encode_member, key_of
from vlm_distill_cache.common.errors import CacheFormatError


class TestWebDataset(StoreContract):
    store = "webdataset"
    path = "shards/00000.tar"

    def test_plain_tar_and_safetensors_read_a_shard(self, tmp_path):
        finish_shard(write(tmp_path, "webdataset", ORDINARY))
        with tarfile.open(tmp_path / self.path) as tar:
            members = tar.getmembers()
            for member, position in zip(members, ORDINARY, strict=True):
                key, dot, extension = member.name.partition(".")  # as webdataset splits it
                assert (dot, extension) == (".", "safetensors.zst")
                assert "/" not in key
                plain = Zstd().decode(tar.extractfile(member).read())
                assert_equal_records(safetensors.numpy.load(bytes(plain)), make_record(position))
                header = json.loads(plain[8 : 8 + int.from_bytes(plain[:8], "little")])
                assert header["__metadata__"] == {"sample_id": sample_id(position)}
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (
                    0,
                    0,
                    0,
                    "",
                    0o644,
                )

    def test_the_webdataset_package_iterates_a_shard(self, tmp_path):
        from webdataset.tariterators import group_by_keys, tar_file_expander

        finish_shard(write(tmp_path, "webdataset", ORDINARY))
        with (tmp_path / self.path).open("rb") as file:
            samples = list(group_by_keys(tar_file_expander([{"url": self.path, "stream": file}])))
        found = {sample["__key__"]: sample["safetensors.zst"] for sample in samples}
        assert list(found) == [key_of(sample_id(p)) for p in ORDINARY]
        for position in ORDINARY:
            record = safetensors.numpy.load(bytes(Zstd().decode(found[key_of(sample_id(position))])))
            assert_equal_records(record, make_record(position))

    @given(st.lists(st.text(min_size=1, max_size=120), min_size=2, max_size=2, unique=True))
    def test_keys_are_safe_short_and_unique(self, names):
        names = [n for n in names if n.isprintable()]
        keys = [key_of(name) for name in names]
        assert len(set(keys)) == len(names)
        for key in keys:
            assert len(key + EXTENSION) < 100
            assert not set(key) & set("./\\: ")

    def test_long_sample_ids_come_back(self, tmp_path):
        writer = write(tmp_path, "webdataset", [])
        names = ["a" * 500, "a" * 500 + "b", "~h", "~2e", ".", "../../etc/passwd"]
        for name in names:
            writer.append(name, make_record(4))
        finish_shard(writer)
        assert list(read_all(tmp_path, "webdataset")) == names

    def tar_of(self, tmp_path, member, data=b""):
        (tmp_path / "shards").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / self.path, "w") as tar:
            tar.addfile(member, io.BytesIO(data))

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("../evil" + EXTENSION, tarfile.REGTYPE),
            ("/evil" + EXTENSION, tarfile.REGTYPE),
            ("a.b" + EXTENSION, tarfile.REGTYPE),
            ("readme.md", tarfile.REGTYPE),
            ("a" + EXTENSION, tarfile.SYMTYPE),
            ("a" + EXTENSION, tarfile.LNKTYPE),
            ("a" + EXTENSION, tarfile.CHRTYPE),
            ("a" + EXTENSION, tarfile.DIRTYPE),
        ],
    )
    def test_members_that_are_no_records_are_refused(self, tmp_path, name, kind):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        self.tar_of(tmp_path, member)
        with pytest.raises(CacheFormatError, match="is not a record of a cache"):
            read_all(tmp_path, "webdataset")

    def test_decompression_bombs_are_refused_before_they_allocate(self, tmp_path):
        bomb = bytearray(Zstd().encode(b"\0" * 100_000))
        assert bomb[4] >> 6 == 2  # the header declares the size in 4 bytes, single segment or not
        start = 5 if bomb[4] & 32 else 6
        assert int.from_bytes(bomb[start : start + 4], "little") == 100_000
        bomb[start : start + 4] = (0xFFFFFFFF).to_bytes(4, "little")
        with pytest.raises(CacheFormatError, match="declares 4294967295 bytes, above"):
            decode_member(bytes(bomb), "here")

    def test_damaged_members_are_errors_of_ours(self):
        data = encode_member("x", make_record(4))
        assert decode_member(data, "here")[0] == "x"
        for cut in (0, 4, 10, 17, len(data) // 2, len(data) - 1):
            with pytest.raises(CacheFormatError, match="here"):
                decode_member(data[:cut], "here")
        for plain in (b"", b"\0" * 100, b"\xff" * 100, safetensors.numpy.save({"a": np.zeros(2)})):
            with pytest.raises(CacheFormatError, match="here"):
                decode_member(bytes(Zstd().encode(plain + b"")), "here")

    def test_a_member_under_a_wrong_key_is_noticed(self, tmp_path):
        data = encode_member("b", make_record(4))
        member = tarfile.TarInfo("a" + EXTENSION)
        member.size = len(data)
        self.tar_of(tmp_path, member, data)
        with pytest.raises(CacheFormatError, match="the member says it is 'b'"):
            read_all(tmp_path, "webdataset")

    def test_a_tar_cut_between_members_is_noticed(self, tmp_path):
        finish_shard(write(tmp_path, "webdataset", ORDINARY))
        with tarfile.open(tmp_path / self.path) as tar:
            places = [m.offset for m in tar.getmembers()[1:]]
        data = (tmp_path / self.path).read_bytes()
        for place in places:
            (tmp_path / self.path).write_bytes(data[:place])
            with pytest.raises(CacheFormatError, match="truncated"):
                read_all(tmp_path, "webdataset")
