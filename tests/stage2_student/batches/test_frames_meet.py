"""Teacher and student read other frames, or fewer pictures: what of them meets follows from times and shared volume."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.attention.tiles import Tile, View, grid_tile, several_to_arrays
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.stage2_student.batches.dataset import check_join
from vlm_distill_cache.stage2_student.batches.frames import frame_bounds, media_of, on_teachers_pictures, pair_media
from vlm_distill_cache.stage2_student.batches.gaze import gaze_on
from vlm_distill_cache.stage2_student.batches.grid import meet, meet_alone, meet_cells, meetings

rising = st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True).map(
    lambda times: sorted(t / 4 for t in times)
)


def owner(times, at):
    """The frame whose second is nearest; of two as near the later."""
    return len(times) - 1 - int(np.argmin(np.abs(np.array(times)[::-1] - at)))


@given(teacher=rising, student=rising)
@settings(max_examples=25, deadline=None)
def test_a_students_frame_shows_what_of_each_frame_their_times_share(teacher, student):
    """Against an integration over time: at each moment the nearest frame of either side is shown."""
    bounds = frame_bounds(teacher, student)
    assert bounds[0] == 0
    assert bounds[-1] == len(teacher)
    assert (np.diff(bounds) > 0).all()
    low, high = min(teacher[0], student[0]), max(teacher[-1], student[-1])
    if low == high:
        return
    moments = low + (np.arange(4000) + 0.5) / 4000 * (high - low)
    shared = np.zeros((len(teacher), len(student)))
    for moment in moments:
        shared[owner(teacher, moment), owner(student, moment)] += 1 / 4000
    if (shared.sum(axis=1) == 0).any():  # one frame at the end of a side, of no time at all
        return
    shared /= shared.sum(axis=1, keepdims=True)  # of each of the teacher's frames
    found = [
        [max(0.0, min(bounds[q + 1], p + 1) - max(bounds[q], p)) for q in range(len(student))]
        for p in range(len(teacher))
    ]
    np.testing.assert_allclose(found, shared, atol=0.01)


def frames(rows, count, step=1, first=0.0):
    """Tiles of frames of rows x rows tokens, so many pictures a token."""
    return tuple(grid_tile(rows, rows, View((first + k, first + k + step), True)) for k in range(0, count, step))


def test_pictures_meet_one_by_one():
    """A block for each picture, which is what the two would be alone."""
    teacher = (grid_tile(4, 4), grid_tile(6, 6, View((1.0, 2.0))), *frames(2, 2, first=2.0))
    student = (grid_tile(2, 2), grid_tile(3, 3, View((1.0, 2.0))), *frames(4, 2, first=2.0))
    common = meet(teacher, student)
    alone = [meet((grid_tile(a, a),), (grid_tile(b, b),)) for a, b in ((4, 2), (6, 3), (2, 4), (2, 4))]
    for side in ("teacher_pool", "student_pool"):
        assert torch.equal(getattr(common, side), torch.block_diag(*(getattr(one, side) for one in alone)))
    assert len(common.content) == 4 + 9 + 4 + 4
    cells = tuple(grid_tile(2, 2, View((float(k), k + 1.0))) for k in range(4))
    through = meet_cells(cells, student).student_pool
    ones = [meet_cells((grid_tile(2, 2),), (grid_tile(b, b),)).student_pool for b in (2, 3, 4, 4)]
    torch.testing.assert_close(through, torch.block_diag(*ones))


@pytest.mark.parametrize("swap", [False, True])
def test_tokens_over_two_frames_meet_both_of_them(swap):
    deep, flat = frames(2, 4, step=2), frames(2, 4)
    parts = meetings(flat, deep) if swap else meetings(deep, flat)
    assert [len(part.teacher) + len(part.student) for part in parts] == [3, 3]
    common = meet(deep, flat)  # 8 tokens, 16 tokens
    assert common.is_teachers
    wanted = torch.zeros(16, 8)
    for frame in range(4):
        wanted[4 * frame : 4 * frame + 4, 4 * (frame // 2) : 4 * (frame // 2) + 4] = torch.eye(4)
    assert torch.equal(common.student_pool, wanted)


def test_mass_on_frames_that_nobody_else_saw_goes_where_their_time_went():
    teacher, student = frames(2, 8), frames(2, 3)
    times = [float(t) for t in range(8)]
    pairs = pair_media(
        media_of(8, [(0, t) for t in times]), media_of(3, [(0, t) for t in (0.0, 3.0, 6.0)]), where="x", fewer=False
    )
    moved = on_teachers_pictures(student, pairs, pictures=3)
    assert [tile.span for tile in moved] == [(0.0, 2.0), (2.0, 5.0), (5.0, 8.0)]
    common = meet(teacher, moved)
    shares = torch.rand(32, generator=torch.Generator().manual_seed(0))
    per_frame = shares.view(8, 4)
    wanted = torch.stack([per_frame[:2].sum(0), per_frame[2:5].sum(0), per_frame[5:].sum(0)])
    torch.testing.assert_close((shares @ common.teacher_pool).view(3, 4), wanted)
    torch.testing.assert_close(gaze_on(shares, teacher, moved).view(3, 4), wanted)


def test_layouts_of_many_frames_share_what_is_kept():
    """Of 30 frames alike one pooling is made; nothing of a whole video stays in memory."""
    from vlm_distill_cache.stage2_student.batches.grid import _kept_pair

    teacher, student = frames(3, 30), frames(2, 30)
    before = _kept_pair.cache_info().misses
    meet(teacher, student)
    assert _kept_pair.cache_info().misses <= before + 1
    size = _kept_pair.cache_info().currsize
    meet_alone(frames(2, 6), frames(2, 4))
    assert _kept_pair.cache_info().currsize == size


class Encoded:
    """What of an `EncodedSample` is compared."""

    def __init__(self, tiles, hashes, times=()):
        self.tiles, self.image_hashes, self.frame_times = tiles, hashes, times
        self.labels, self.supervised_rows = np.array([3, 4]), np.array([0, 1])

    @property
    def image_hash(self):
        return b"".join(self.image_hashes) or bytes(16)


def digest(number):
    return bytes([number]) * 16


def record_of(tiles, hashes, times=()):
    return {
        "labels": np.array([3, 4]),
        "image_hash": np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16),
        **several_to_arrays(tiles, times, len(hashes)),
    }


STILLS = (grid_tile(2, 2), grid_tile(2, 2, View((1.0, 2.0))))


def test_each_picture_is_compared_and_the_changed_one_is_named():
    record = record_of(STILLS, [digest(1), digest(2)])
    assert check_join(record, Encoded(STILLS, (digest(1), digest(2))), where="x") == STILLS
    names = ["a.png", "b.png"]
    with pytest.raises(CacheMismatchError, match=r"picture 2 of 2 \(b.png\)'s hash was 0202"):
        check_join(record, Encoded(STILLS, (digest(1), digest(9))), where="x", names=lambda: names)
    one = Encoded(STILLS[:1], (digest(1),))
    with pytest.raises(CacheMismatchError, match="the teacher saw 2 pictures and videos, the data now has 1"):
        check_join(record, one, where="x")
    assert check_join(record, one, where="x", fewer=True) == STILLS[:1]
    with pytest.raises(CacheMismatchError, match="was a video when the teacher saw it and is a picture now"):
        check_join(record_of(frames(2, 1), [digest(1)], [(0, 0.0)]), one, where="x")


def test_of_a_video_frames_of_the_same_second_are_compared():
    times = [(-1, float("nan")), (1, 0.0), (1, 1.0), (1, 2.0)]
    tiles = (grid_tile(2, 2), *frames(2, 3, first=1.0))
    record = record_of(tiles, [digest(n) for n in range(1, 5)], times)
    own = (grid_tile(2, 2), *frames(2, 2, first=1.0))
    seen = Encoded(own, (digest(1), digest(2), digest(4)), (times[0], times[1], times[3]))
    assert [tile.span for tile in check_join(record, seen, where="x")] == [(0.0, 1.0), (1.0, 2.5), (2.5, 4.0)]
    other = Encoded(own, (digest(1), digest(2), digest(7)), (times[0], times[1], times[3]))
    with pytest.raises(CacheMismatchError, match=r"frame 3 of video 2 of 2's hash was 0404"):
        check_join(record, other, where="x")
    elsewhere = Encoded(own, (digest(1), digest(8), digest(7)), (times[0], (1, 0.5), (1, 1.5)))
    check_join(record, elsewhere, where="x")  # no second in common: nothing to compare


@pytest.mark.parametrize(
    "damage",
    [
        {"image_hash": np.ones((2, 16), np.uint8)},
        {"frame_times": np.array([(0, 0.0), (0, np.inf), (0, np.inf)], np.float32)},
        {"frame_times": np.array([(np.nan, 0.0), (0, 1.0), (0, 2.0)], np.float32)},
        {"frame_times": np.array([(0, 0.0), (0, 2.0), (0, 1.0)], np.float32)},
        {"frame_times": np.array([(0, 0.0), (0, 1.0)], np.float32)},
    ],
)
def test_what_a_record_says_of_its_pictures_and_cannot_be_is_refused_before_it_is_used(damage):
    tiles, times = frames(2, 3), [(0, 0.0), (0, 1.0), (0, 2.0)]
    hashes = [digest(1), digest(2), digest(3)]
    with pytest.raises(CacheFormatError, match="verify --deep"):
        check_join(record_of(tiles, hashes, times) | damage, Encoded(tiles, tuple(hashes), times), where="x")


def test_padding_and_tiles_of_one_picture_meet_as_they_did():
    padded = (Tile(8, 8, (0.0, -0.5, 1.0, 1.5)),)
    shifted = (Tile(8, 8, (0.0, -0.5, 1.0, 1.5), (3.0, 4.0), True),)
    assert torch.equal(meet(padded, STILLS[:1]).teacher_pool, meet(shifted, frames(2, 1, first=3.0)).teacher_pool)
