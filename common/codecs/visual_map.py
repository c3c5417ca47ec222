"""How visual tokens attend to visual tokens: the whole map, exact where the released loss needs it.

That loss filters maps by their attention sinks: the teacher's mask must be exact, the values may be coarse.

============ =========================================== =============================== ===============
preset       kept of a map                               sink mask                       serves
============ =========================================== =============================== ===============
``exact``    every value in 8 bits; column means         exact: a code knows its side    every loss
``blocks``   mask bits; column means; each pair of short exact                           sink-filtered
             columns, means of nearby pairs of others
``compact``  as ``blocks``, with longer runs and coarser exact                           sink-filtered
             codes
``f4``       float32                                     exact                           every loss
``exact8``   8-bit logarithms below one (older caches)   not exact near the threshold    every loss
============ =========================================== =============================== ===============

**What is exact, when.** The mask is that of float32 maps on *the map's own cells*: the teacher's tokens, or
with `grid` the pooled cells. A student with these tokens, or with finer ones that are pooled to them, is
trained with exactly the teacher's mask. A student with coarser tokens pools the map again, and the mask is then
computed from the pooled values: exact with `f4`, close with `exact`, refused with `blocks` and `compact`.
Pairs of tokens that lie in padding enter no loss; `exact`, `blocks` and `compact` store them as zero.

Measured (`make bench-codec`) on a SmolLM2-based model's maps, 576 tokens, 7 groups, a student of another layer
group: kB a sample and cosine of the sink-filtered loss's gradient with the exact one, mean (worst): `exact` 929, 0.9999
(0.9999); `blocks` 182, 0.9999 (0.9998); `compact` 73, 0.9995 (0.9992); `exact8` 848, 0.9967 (0.9908); `f4` 3680.

The mask of `exact8` is computed from its rounded values: with a student of a later layer group the cosine falls to 0.9823
(0.9244), with 36 tokens to 0.93 (0.69). Its caches are read as they are. Mask bits would take 145 kB a sample more,
which makes it larger than `exact`, whose codes hold the mask: so it gets none, and builds should choose `exact`.

**Several pictures** (format version 2): each view, a picture or the frames that tokens show together, has columns and a map
of its own, of its own tokens, filtered by its own sinks; what its tokens see of other views is not kept. A record holds the
arrays of the views one behind the other. All presets serve, for each view is kept as the one of a sample with one picture.

Dims: G layer groups, N cells of the map (visual tokens, or cells of a pooled map), P = N (N + 1) / 2 pairs
(query, key <= query), row-major; a pooled map has N * N, since a cell covers tokens of two rows; V views.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, get_args

import numpy as np
import numpy.typing as npt

from vlm_distill_cache.common.attention.tiles import (
    Tile,
    box_array,
    carries_image,
    of_view,
    pooled_tiles,
    tiles_from_array,
    tiles_of,
    tiles_to_array,
    views_of,
)
from vlm_distill_cache.common.cache.schema import MAX_TRAILING_ELEMENTS, Field, Record
from vlm_distill_cache.common.codecs.description import Codec, check_flag, check_whole_number, out_of_range
from vlm_distill_cache.common.codecs.kept_columns import (
    KEPT_LEVELS,
    RUNS,
    Runs,
    column_means,
    decode_columns,
    decode_roots,
    decode_sinks,
    encode_columns,
    encode_roots,
    encode_sinks,
    find_runs,
    fit_columns,
    means_damage,
    nearest_first,
    pack_mask,
    sink_threshold,
    unpack_mask,
)
from vlm_distill_cache.common.codecs.quantise import ArrayT, FloatArray, decode_log8, encode_log8
from vlm_distill_cache.common.codecs.row_attention import MOST_MASS, check_attention
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, SampleError


@dataclass(frozen=True, kw_only=True)
class VisualColumnsCodec(Codec):
    """How a record stores the mean over visual query rows that carry image, per visual key: of each view over its own rows.

    Round trip: float16 (relative 2^-11, absolute 2^-25), or bit for bit with `exact`.
    """

    groups: int
    exact: bool = False

    signal: ClassVar[str] = "visual_columns"

    def __post_init__(self) -> None:
        check_whole_number("groups", self.groups, 1, MAX_TRAILING_ELEMENTS)
        check_flag("exact", self.exact)

    def fields(self) -> tuple[Field, ...]:
        """One array: a value per visual token and group."""
        dtype = "f4" if self.exact else "f2"
        return (Field(name=self.signal, dtype=dtype, axis="visual", trailing=(self.groups,)),)

    def encode(self, columns: npt.ArrayLike) -> Record:
        """Pack column means.

        Args:
            columns: float `[G, N]`, mass; N is 0 without an image.

        Returns:
            `visual_columns` f2 or f4 `[N, G]`.

        Raises:
            SampleError: If a value is negative or not finite.
        """
        values = np.asarray(columns, np.float32)
        if values.ndim != 2 or len(values) != self.groups:
            raise ValueError(f"encode: expected columns [{self.groups}, N], got {[*values.shape]}")
        check_attention(values, "visual columns")
        return {self.signal: values.T.astype(np.float32 if self.exact else np.float16, order="C")}

    def decode(self, record: Record) -> FloatArray:
        """Unpack column means, float32 `[G, N]`; of several pictures the record also holds the fields that say which."""
        values = record[self.signal]
        if values.ndim != 2 or values.shape[1] != self.groups:
            raise CacheFormatError(
                f"visual columns of a record: expected (N, {self.groups}), got {values.shape}; "
                "the cache is damaged: run `cachectl verify`"
            )
        self.refuse_impossible(record)
        return values.T.astype(np.float32, order="C")

    def ranges(self, record: Record) -> Iterator[str]:
        """Yield values that are no probability mass, and groups whose keys have more than all of it together."""
        yield from out_of_range(self.signal, record[self.signal], 0, MOST_MASS, said="0 to 1")
        columns, starts = record[self.signal], np.array([0])
        sizes = [sum(tile.token_count for tile in view) for view in _views(record)]
        if len(columns) == sum(sizes):  # else `image_lengths` says what is wrong
            starts = np.cumsum([0, *sizes[:-1]])
        if len(columns):
            yield from _too_much(self.signal, np.add.reduceat(columns, starts, dtype=np.float64), MOST_MASS)


def _views(record: Record) -> list[tuple[Tile, ...]]:
    """The tiles of each view of a record, as if there were no other; none if it does not say."""
    tiles = tiles_of(record) if "tiles" in record else ()
    return [of_view(tiles, view) for view in views_of(tiles)]


def _too_much(name: str, masses: np.ndarray, most: float) -> Iterator[str]:
    """Yield that the sum of a distribution's masses is above one; NaN is not this check's."""
    if masses.size and masses.max() > most:
        yield f"{name} has {masses.max():.4g} of the mass in one row; expected at most 1"


def _refuse_masses(masses: np.ndarray, most: float) -> None:
    for line in _too_much("visual map", masses, most):
        raise CacheFormatError(f"{line}; no teacher says so, the cache is damaged: run `cachectl verify --deep`")


@dataclass(frozen=True)
class FilteredMaps(Generic[ArrayT]):
    """Visual maps, query rows by key columns, as arrays (decoded) or tensors (`common.codecs.live.TeacherMap`).

    Attributes:
        values: float32 `[..., N, N]`, probability mass of each pair; where `complete` is False, a mean over
            pairs of the same key column with `kept`, and some positive number for pairs without.
        kept: bool `[..., N, N]`: both tokens carry image and the mass is positive and at most mean + std.
        complete: Whether every value is that of its own pair.
    """

    values: ArrayT
    kept: ArrayT
    complete: bool = True


# What a row of masses may sum to once they are coded: rounding is 3.2 % of a value or e^-16, and less than half a step.
_MOST_OF_ROW = {"f4": MOST_MASS, "exact8": 1.05, "exact": 1.15}
_MOST_OF_MEANS = 1.01  # of a row, on average: float16 means of columns
_MOST_OF_FITTED_ROW = 1.5  # `exact` once its columns are fitted to their means, which moves mass between rows

MapPreset = Literal["exact", "blocks", "compact", "exact8", "f4"]

MAP_RANGE_NATS = 16.0
"""`exact8`: attention below e^-16 (1e-7) is stored as that, never as zero: the filter asks for non-zero values."""


@dataclass(frozen=True, kw_only=True)
class VisualMapCodec(Codec):
    """How a record stores visual-by-visual maps.

    Round trips, t being the sink threshold of a sample's group and roots taken of shares of t. `exact`,
    `blocks`, `compact`: the mask is exact, and so is the mean over the kept pairs of a column within float16 (relative
    2^-11, absolute t 2^-24). `exact`: zero stays zero; the root of a kept value v is within (1 + sqrt(v / the
    column's mean)) / 190; a sink is within a factor (largest / t)^(1 / 318). `blocks` and `compact` keep roots of run
    means within (1 + sqrt(run's / column's)) / 254 and / 126; pairs without mask read t. `exact8`: zero stays
    zero; a value of at least e^-16 is within a factor `exp(0.0315)`; a smaller one becomes e^-16. `f4`: bit for bit.

    Attributes:
        preset: What is kept; see the module.
        grid: Side of the grid that each tile's tokens are pooled to before encoding; 0: the teacher's own
            tokens, and the map is causal.
    """

    groups: int
    preset: MapPreset = "exact8"  # plans of older caches name it; builds choose `exact`
    grid: int = 0

    signal: ClassVar[str] = "visual_map"
    older: ClassVar[Mapping[str, Any]] = {"grid": 0}  # from before maps could be pooled

    def __post_init__(self) -> None:
        check_whole_number("groups", self.groups, 1, MAX_TRAILING_ELEMENTS)
        check_whole_number("grid", self.grid, 0, 256)
        if self.preset not in get_args(MapPreset):
            raise ConfigError(f"preset: expected one of {list(get_args(MapPreset))}, got {self.preset!r}")

    @property
    def complete(self) -> bool:
        """Whether every pair's own value is kept."""
        return self.preset not in RUNS

    def to_dict(self) -> dict[str, Any]:
        """The exact JSON stored in a cache's plan."""
        stored = super().to_dict()
        if not self.grid:
            del stored["grid"]  # as plans had it before maps could be pooled
        return stored

    def fields(self) -> tuple[Field, ...]:
        """A value per pair and group and their scale; or mask, column means, codes and their scale."""
        scale = Field(name="map_scale", dtype="f4", axis="map", trailing=(self.groups,))
        means = Field(name="map_means", dtype="f2", axis="cell", trailing=(self.groups,))
        if not self.complete:
            mask = Field(name="map_mask", dtype="u1", axis="mask")
            return scale, means, mask, Field(name="map_codes", dtype="u1", axis="code")
        dtype, axis = "f4" if self.preset == "f4" else "u1", "square" if self.grid else "pair"
        values = Field(name=self.signal, dtype=dtype, axis=axis, trailing=(self.groups,))
        largest = Field(name="map_largest", dtype="f4", axis="map", trailing=(self.groups,))
        return (values, scale, largest, means) if self.preset == "exact" else (values,)

    def cells_of(self, tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
        """The cells that the map's rows and columns stand for, given the teacher's tiles: of each view its own."""
        if not self.grid:
            return tiles
        return tuple(
            replace(cell, span=view.span, is_frame=view.is_frame)
            for view in views_of(tiles)
            for cell in pooled_tiles(of_view(tiles, view), self.grid)
        )

    def encode(self, maps: Any, *, tiles: tuple[Tile, ...] | None = None) -> Record:
        """Pack maps.

        Args:
            maps: float `[G, N, N]`, query rows by key columns, mass in [0, 1]; zero above
                the diagonal unless pooled; N is 0 without an image. Of several views one such map each, in order.
            tiles: Of the teacher's tokens, as the record's own `tiles` say. None: all cells carry image; not for
                `blocks` and `compact`, which need to know what is near.

        Raises:
            ValueError: If the shape is not the codec's, or the tiles are missing or of another number of cells.
            SampleError: If a value is negative, above 1 or not finite, or a query sees a later key.
        """
        views = views_of(tiles or ())
        if len(views) <= 1:
            return self._encode_view(maps, tiles)
        if len(maps) != len(views):
            raise ValueError(f"encode: expected a map of each of {len(views)} views, got {len(maps)}")
        parts = [
            self._encode_view(view_maps, of_view(tiles or (), view))
            for view_maps, view in zip(maps, views, strict=True)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _encode_view(self, maps: npt.ArrayLike, tiles: tuple[Tile, ...] | None) -> Record:
        values = np.asarray(maps, np.float32)
        if values.ndim != 3 or len(values) != self.groups or values.shape[1] != values.shape[2]:
            raise ValueError(f"encode: expected maps [{self.groups}, N, N], got {[*values.shape]}")
        self._check_mass(values)
        cells = values.shape[1]
        content = None if tiles is None or not cells else carries_image(box_array(self.cells_of(tiles)))
        if content is not None and len(content) != cells:
            raise ValueError(f"encode: expected a map of {len(content)} cells, as the tiles have, got {cells}")
        if self.preset in ("f4", "exact8"):
            pairs = np.ascontiguousarray(values[:, *self._pairs(cells)].T)  # [P, G]
            if self.preset == "f4":
                return {self.signal: pairs}
            return {self.signal: encode_log8(np.minimum(pairs, np.float32(1)), MAP_RANGE_NATS)}
        kept, threshold = _filter(values, content)
        scale = threshold.astype(np.float32)  # [G, 1, 1]
        if content is not None:
            values = values * (content[:, None] & content)
        with np.errstate(over="ignore"):  # all values so small that their mean is 0 in float32
            ratios = np.divide(values, scale, out=np.zeros_like(values), where=values > 0)
        some = min(cells, 1)
        record = {"map_scale": scale.reshape(1, -1)[:some]}
        if self.preset == "exact":
            means = column_means((ratios * kept).sum(axis=1, dtype=np.float64), kept.sum(axis=1))  # [G, key]
            largest = values.max(axis=(1, 2), initial=0.0)  # [G]
            codes = np.where(kept, encode_roots(ratios, KEPT_LEVELS), encode_sinks(values, scale, largest))
            return record | {
                self.signal: np.ascontiguousarray(codes[:, *self._pairs(cells)].T),
                "map_largest": largest[None][:some],
                "map_means": np.ascontiguousarray(means.T),
            }
        if tiles is None and cells:
            raise ValueError(f"encode: preset {self.preset!r} needs the tiles of the {cells} cells")
        runs, near = RUNS[self.preset], self._nearest_first(self.cells_of(tiles or ()), cells)
        by_key = kept.transpose(0, 2, 1)  # [G, key, query]
        means, codes = encode_columns(
            _take(ratios.transpose(0, 2, 1), near),
            _take(by_key, near),
            growth=runs.growth,
            levels=runs.levels,
        )
        return record | {
            "map_means": np.ascontiguousarray(means.reshape(self.groups, cells).T),
            "map_mask": pack_mask(by_key, causal=not self.grid),
            "map_codes": codes,
        }

    def decode(self, record: Record) -> FilteredMaps[np.ndarray] | tuple[FilteredMaps[np.ndarray], ...]:
        """Unpack maps `[G, N, N]`, as near as the preset keeps them.

        Args:
            record: Holds the arrays of `fields`, and the `tiles` that `encode` was told; of several pictures also the
                other fields that say which.

        Returns:
            Values and mask; the mask is exact but for `exact8`. Of several views a tuple: those of each, in order.

        Raises:
            CacheFormatError: If its arrays do not fit each other, or have more mass than the rows of a map.
        """
        self.refuse_impossible(record)
        if len(views := self._view_records(record)) > 1:
            return tuple(map(self._decode_view, views))
        return self._decode_view(record)

    def _view_records(self, record: Record) -> list[Record]:
        """A record of each view, as if it were the only one; one at least.

        Raises:
            CacheFormatError: If the arrays are not as long as those of the views together.
        """
        views = _views(record)
        if len(views) <= 1 or not any(len(record[field.name]) for field in self.fields()):  # another record holds them
            return [record]
        found, place = [], {field.name: 0 for field in self.fields()}
        for tiles in views:
            lengths = self.image_lengths(tiles)
            cells = sum(tile.token_count for tile in self.cells_of(tiles))
            part: Record = {"tiles": tiles_to_array(tiles)}
            for name in place:  # the mask stands in front of the codes, whose number it says
                if name == "map_mask":
                    lengths[name] = self.groups * -(-self._pair_count(cells) // 8)
                elif name == "map_codes":
                    lengths[name] = self._find_runs(part, cells).total
                part[name] = record[name][place[name] : place[name] + lengths[name]]
                place[name] += lengths[name]
            found.append(part)
        for name, length in place.items():
            if len(record[name]) != length:
                raise CacheFormatError(
                    f"visual map of a record: expected {length} entries of {name} for its {len(views)} views, got "
                    f"{len(record[name])}; the cache is damaged: run `cachectl verify --deep`"
                )
        return found

    def _find_runs(self, record: Record, cells: int) -> Runs:
        """How the kept pairs of a record of one view are divided into codes."""
        kept = unpack_mask(record["map_mask"], self.groups, cells, causal=not self.grid)  # [G, key, query]
        return find_runs(_take(kept, self._nearest_first(self._cells_of(record), cells)), RUNS[self.preset].growth)

    def _pair_count(self, cells: int) -> int:
        return cells * cells if self.grid else cells * (cells + 1) // 2

    def _decode_view(self, record: Record) -> FilteredMaps[np.ndarray]:
        if not self.complete:
            return self._decode_columns(record)
        codes = record[self.signal]
        cells = math.isqrt(len(codes)) if self.grid else (math.isqrt(8 * len(codes) + 1) - 1) // 2
        pairs = self._pair_count(cells)
        if codes.ndim != 2 or codes.shape[1] != self.groups or pairs != len(codes):
            expected = "N * N" if self.grid else "N(N+1)/2"
            raise CacheFormatError(
                f"visual map of a record: expected ({expected}, {self.groups}), got {codes.shape}; "
                "the cache is damaged: run `cachectl verify`"
            )
        where = self._pairs(cells)
        values = np.zeros((self.groups, cells, cells), np.float32)
        if self.preset != "exact":
            values[:, *where] = (codes if self.preset == "f4" else decode_log8(codes, MAP_RANGE_NATS)).T
            # Without tiles, or tiles of other tokens, all cells count; who joins both checks their number.
            content = carries_image(box_array(self._cells_of(record)))
            _refuse_masses(values.sum(axis=2), _MOST_OF_ROW[self.preset])
            return FilteredMaps(values, _filter(values, content if len(content) == cells else None)[0])
        dense = np.zeros(values.shape, np.uint8)
        dense[:, *where] = codes.T
        kept = (dense > 0) & (dense <= KEPT_LEVELS)
        means, scale = self._means(record, cells).T, self._per_group(record, "map_scale", cells)
        largest = self._per_group(record, "map_largest", cells)
        ratios = decode_roots(np.where(kept, dense, 0), KEPT_LEVELS)
        factor = fit_columns(means, ratios.sum(axis=1), kept.sum(axis=1))  # [G, key]
        values = np.where(kept, ratios * factor[:, None] * scale, decode_sinks(dense, scale, largest))
        values = values.astype(np.float32)
        _refuse_masses(values.sum(axis=2), _MOST_OF_FITTED_ROW)
        return FilteredMaps(values, kept)

    def _decode_columns(self, record: Record) -> FilteredMaps[np.ndarray]:
        means = self._means(record, len(record["map_means"]))
        cells, runs = len(means), RUNS[self.preset]
        scale = self._per_group(record, "map_scale", cells)
        kept = unpack_mask(record["map_mask"], self.groups, cells, causal=not self.grid)  # [G, key, query]
        near = self._nearest_first(self._cells_of(record), cells)
        columns = decode_columns(
            means.T.reshape(-1),
            record["map_codes"],
            _take(kept, near),
            growth=runs.growth,
            levels=runs.levels,
        ).reshape(kept.shape)
        ratios = np.zeros_like(columns)
        np.put_along_axis(ratios, near[None], columns, axis=2)
        stored = np.zeros((cells, cells), dtype=bool)
        stored[self._pairs(cells)] = True
        kept, ratios = kept.transpose(0, 2, 1), ratios.transpose(0, 2, 1)
        counts = np.count_nonzero(kept, axis=1)  # [G, key]
        _refuse_masses(
            scale[:, 0, 0] * (means.T * counts).sum(axis=1, dtype=np.float64) / max(cells, 1), _MOST_OF_MEANS
        )
        # A pair without mask is a sink or zero: its value enters no loss, but a map of sinks is no empty map.
        values = np.where(kept, ratios, stored.astype(np.float32)) * scale
        return FilteredMaps(np.ascontiguousarray(values), np.ascontiguousarray(kept), complete=False)

    def ranges(self, record: Record) -> Iterator[str]:
        """Yield masses that are none."""
        for field in self.fields():
            if field.dtype != "u1":
                # A threshold is a mean and a standard deviation.
                most, said = (2.0, "0 to 2") if field.name == "map_scale" else (MOST_MASS, "0 to 1")
                yield from out_of_range(field.name, record[field.name], 0, most, said=said)

    def damage(self, record: Record) -> Iterator[str]:
        """Yield masses that are none, rows of more than one, and means, masks and codes that contradict each other."""
        yield from super().damage(record)
        try:
            views = self._view_records(record)
        except CacheFormatError as error:
            yield str(error)
            return
        for view in views:
            yield from self._view_damage(view)

    def _view_damage(self, record: Record) -> Iterator[str]:
        """The same of the arrays of one view."""
        if self.complete and len(codes := record[self.signal]):
            cells = math.isqrt(len(codes)) if self.grid else (math.isqrt(8 * len(codes) + 1) - 1) // 2
            counts = np.full(cells, cells) if self.grid else np.arange(1, cells + 1)
            if counts.sum() == len(codes):  # else decoding says that these are no pairs of so many cells
                rows = np.add.reduceat(
                    self._pair_values(record), np.cumsum(counts) - counts, dtype=np.float64
                )  # [query, G]
                yield from _too_much(self.signal, rows, _MOST_OF_ROW[self.preset])
        if not len(record.get("map_means", ())):
            return
        cells = len(record["map_means"])
        if self.preset == "exact":
            codes = record[self.signal]  # [pairs, G]
            kept = (codes > 0) & (codes <= KEPT_LEVELS)
            column = np.arange(self.groups) * cells + self._pairs(cells)[1][:, None]  # [pairs, G]
            counts = np.bincount(column[kept], minlength=cells * self.groups)
            sinks, scale, largest = codes > KEPT_LEVELS, record["map_scale"][0], record["map_largest"][0]
            yield from means_damage(
                record, counts, codes[kept], column[kept], KEPT_LEVELS, above=np.count_nonzero(sinks, axis=0)
            )
            if (largest[sinks.any(axis=0)] < scale[sinks.any(axis=0)] * (1 - 1e-6)).any():
                yield f"{self.signal} has sinks, but map_largest is below map_scale"
            if (largest[codes.any(axis=0)] == 0).any():
                yield f"map_largest is 0, but {self.signal} has codes of some mass"
            return
        coding, codes, runs = RUNS[self.preset], record["map_codes"], self._find_runs(record, cells)
        if len(codes) != runs.total:
            yield f"map_codes has {len(codes)} codes; its mask says {runs.total}"
        elif len(codes) and not 1 <= codes.min() <= codes.max() <= coding.levels:
            yield f"map_codes is {codes.min()} to {codes.max()}; expected 1 to {coding.levels}"
        else:
            yield from means_damage(record, runs.counts, codes[runs.run], runs.column, coding.levels)

    def _pair_values(self, record: Record) -> np.ndarray:
        """About what each pair of a complete map stands for, float `[P, G]`: kept ones before they are fitted to their column."""
        codes = record[self.signal]
        if self.preset != "exact":
            return codes if self.preset == "f4" else decode_log8(codes, MAP_RANGE_NATS)
        every = np.arange(256, dtype=np.uint8)[:, None]
        roots = decode_roots(np.where(every <= KEPT_LEVELS, every, 0), KEPT_LEVELS)
        table = roots * record["map_scale"] + decode_sinks(
            every, record["map_scale"], record["map_largest"]
        )  # [256, G]
        return np.take_along_axis(table, codes.astype(np.intp), axis=0)

    def _cells_of(self, record: Record) -> tuple[Tile, ...]:
        """The tiles of a record's cells; none if it does not say."""
        return self.cells_of(tiles_from_array(np.asarray(record["tiles"]))) if "tiles" in record else ()

    def _nearest_first(self, tiles: tuple[Tile, ...], cells: int) -> np.ndarray:
        """The order of queries in the columns of a map, int64 `[N, N]`."""
        if not cells:  # no image, or a record that leaves its image's arrays to another
            return np.zeros((0, 0), np.int64)
        grids = tuple((tile.rows, tile.cols) for tile in tiles)
        found = sum(rows * cols for rows, cols in grids)
        if found != cells:
            raise CacheFormatError(
                f"visual map of a record: its map has {cells} cells, its tiles {found}; "
                "the cache is damaged: run `cachectl verify`"
            )
        return nearest_first(grids)

    def _means(self, record: Record, cells: int) -> np.ndarray:
        """Column means of a record's map in thresholds, float16 `[N, G]`."""
        means = record["map_means"]
        if means.shape != (cells, self.groups) or not ((means >= 0) & (means <= 1)).all():
            raise CacheFormatError(
                f"visual map of a record: expected {(cells, self.groups)} column means in [0, 1], got "
                f"{means.shape}{', some outside' * (means.shape == (cells, self.groups))}; "
                "the cache is damaged: run `cachectl verify`"
            )
        return means

    def _per_group(self, record: Record, name: str, cells: int) -> FloatArray:
        """A mass of each group of a record's map, float32 `[G, 1, 1]`; `[0, 1, 1]` without one."""
        masses, some = record[name], min(cells, 1)
        if masses.shape != (some, self.groups) or not (np.isfinite(masses) & (masses >= 0)).all():
            raise CacheFormatError(
                f"visual map of a record: expected {(some, self.groups)} finite {name} of at least 0, got "
                f"{masses.shape}; the cache is damaged: run `cachectl verify`"
            )
        return masses.reshape(-1, 1, 1) if some else np.zeros((self.groups, 1, 1), np.float32)

    def _pairs(self, cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries and keys of the stored pairs, row-major."""
        if not self.grid:
            return np.tril_indices(cells)
        queries, keys = np.indices((cells, cells)).reshape(2, -1)
        return queries, keys

    def _check_mass(self, values: FloatArray) -> None:
        check_attention(values, "visual map")
        largest = float(values.max(initial=0.0))
        if largest > 1 + 1e-3:
            raise SampleError(f"visual map: expected probability mass of at most 1, got {largest}")
        if not self.grid and np.triu(values, 1).any():
            raise SampleError(
                "visual map: expected zeros above the diagonal, but a visual token attends to a later one; "
                "this codec keeps causal maps only: use visual_columns for bidirectional visual tokens"
            )


def _take(maps: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Columns of maps `[G, N, N]`, keys by queries, with each key's queries in its order: `[G * N, N]`."""
    groups, cells = maps.shape[:2]
    return np.take_along_axis(maps, order[None], axis=2).reshape(groups * cells, cells)


def _filter(values: FloatArray, content: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs no sink filter takes out, bool `[G, N, N]`, and the threshold, float64 `[G, 1, 1]`.

    Args:
        content: Cells that carry image, bool `[N]`. None: all do.
    """
    pairs = np.ones(values.shape[1:], bool) if content is None else content[:, None] & content
    # float64: a map of equal values, whose std is 0, must not be all sinks by a rounding of its mean.
    threshold = sink_threshold(values.astype(np.float64), np.broadcast_to(pairs, values.shape))
    return pairs & (values <= threshold) & (values > 0), threshold
