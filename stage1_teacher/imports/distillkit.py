"""Rows of DistillKit's caches: top-k log-probabilities as they are, or packed as its two codecs pack them.

Row j of a sequence of T tokens is about token j + 1, so there are T - 1 of them. A packed row is not read before it is asked for.

Source:
    The formats of arcee-ai/DistillKit: ``compressed_logprobs`` and ``bytepacked_indices``, with ``compression_config.yaml``
    beside the files; ``packed_indices``, ``exact_values`` and ``coeffs`` of its older version; ``token_ids`` and
    ``top_values`` unpacked.

Dims: K tokens of a row, E of them stored as they are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.stage1_teacher.imports.served import (
    Distribution,
    Served,
    add_entry,
    as_id,
    as_ids,
    as_list,
    as_number,
    as_object,
    shown,
)

COMPRESSION = "compression_config"
"""Under this name a row carries what the file beside it says."""
CONFIG_FILE = f"{COMPRESSION}.yaml"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_SPECIAL = {"sqrt": torch.sqrt, "exp": torch.exp}
_MOST = 4096  # tokens of a row
_MOST_TERMS = 64  # of a polynomial, and its highest power
PACKED = ("compressed_logprobs", "packed_indices")


def is_distillkit(body: Mapping[str, Any]) -> bool:
    """Whether a row is one of DistillKit's."""
    return "input_ids" in body and any(name in body for name in (*PACKED, "top_values"))


def read_distillkit(body: Mapping[str, Any]) -> Served:
    """What a row says of its sequence; raises SampleError."""
    tokens = as_ids(body.get("input_ids"), "input_ids")
    if "top_values" in body:
        columns = [as_list(body.get(name), name) for name in ("token_ids", "top_values")]
        unpack = _plain
    else:
        if not isinstance(body.get(COMPRESSION), dict):
            raise SampleError(
                f"its row is packed, and what packs it is not known; put DistillKit's {CONFIG_FILE} beside the file (its settings "
                "k, exact_k, ...)"
            )
        names = ("bytepacked_indices", PACKED[0]) if PACKED[0] in body else (PACKED[1], "exact_values", "coeffs")
        columns = [as_list(body.get(name), name) for name in names]
        codec = _Packed(body[COMPRESSION]) if PACKED[0] in body else _Older(body[COMPRESSION])
        unpack = codec.unpack
    rows = {len(column) for column in columns}
    if rows not in ({len(tokens)}, {len(tokens) - 1}):
        raise SampleError(
            f"a sequence of {len(tokens)} tokens has {sorted(rows)} rows of log-probabilities; expected {len(tokens) - 1}"
        )

    def distribution(place: int) -> Distribution | None:
        if not place:
            return None
        what = f"row {place - 1}"
        ids, values = unpack([column[place - 1] for column in columns], what)
        found: dict[int, float] = {}
        for token, value in zip(ids, values, strict=True):
            add_entry(found, token, value, what)
        return found

    return Served(tokens=tokens, distribution=distribution)


def _plain(parts: Sequence[Any], what: str) -> tuple[list[int], list[float]]:
    ids = [as_id(token, what) for token in as_list(parts[0], what)]
    values = [as_number(value, what) for value in as_list(parts[1], what)]
    if len(ids) != len(values):
        raise SampleError(f"{what} has {len(ids)} token_ids and {len(values)} top_values")
    return ids, values


class _Packed:
    """The newer codec: bytes of exact values, of a polynomial's factors, and of bins of residuals."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.k, self.exact = _size(settings, "k"), _size(settings, "exact_k", least=0)
        self.bits = _index_bits(_size(settings, "d", most=1 << 32))
        if self.exact > self.k:
            raise SampleError(f"{CONFIG_FILE}: exact_k is {self.exact}, more than k, {self.k}")
        self.exact_dtype = _dtype(settings, "exact_dtype")
        self.term_dtype = _dtype(settings, "term_dtype")
        self.delta = bool(settings.get("delta_encoding", True))
        self.bins = [
            (_dtype(item, "scale_dtype"), _size(item, "element_bits", most=32), _size(item, "num_elements"))
            for item in (
                as_object(item, "residual_bins")
                for item in as_list(settings.get("residual_bins") or [], "residual_bins")
            )
        ]
        if sum(count for _, _, count in self.bins) > self.k - self.exact:
            raise SampleError(
                f"{CONFIG_FILE}: residual_bins hold more than k - exact_k = {self.k - self.exact} elements"
            )
        self.terms = self._polynomial(as_list(settings.get("polynomial_terms") or [], "polynomial_terms"), settings)

    def _polynomial(self, terms: list[Any], settings: Mapping[str, Any]) -> Tensor | None:
        """The value of each term at each rank, ``[K - E, terms]``."""
        if not terms:
            return None
        count = self.k - self.exact
        if len(terms) > _MOST or any(
            isinstance(term, bool) or not (isinstance(term, int) or term in _SPECIAL) for term in terms
        ):
            raise SampleError(
                f"{CONFIG_FILE}: polynomial_terms is {shown(terms)}, expected whole numbers, sqrt and exp"
            )
        if settings.get("normalize_t", False):
            ranks = torch.linspace(0, 1, steps=count, dtype=self.term_dtype)
        else:
            ranks = torch.arange(count, dtype=self.term_dtype)
        return torch.stack([ranks**term if isinstance(term, int) else _SPECIAL[term](ranks) for term in terms], dim=-1)

    def unpack(self, parts: Sequence[Any], what: str) -> tuple[list[int], list[float]]:
        """Ids and log-probabilities of one row."""
        ids = _unpack_bits(_bytes(parts[0], what), self.bits, self.k, what)
        data = _Bytes(_bytes(parts[1], what), what)
        exact = data.floats(self.exact, self.exact_dtype)
        out = self.exact_dtype
        factors = None if self.terms is None else data.floats(self.terms.shape[1], self.term_dtype)
        residuals = []
        for scale_dtype, bits, count in self.bins:
            scale = data.floats(1, scale_dtype)
            codes = torch.tensor(
                _unpack_bits(data.take((count * bits + 7) // 8), bits, count, what), dtype=torch.float32
            )
            least = 0 if bits == 1 else -(2 ** (bits - 1))
            residuals.append((codes * 2 - 1) * scale if bits == 1 else (codes + least) * scale)
        rest = torch.zeros(self.k - self.exact, dtype=out)
        if residuals:
            joined = torch.cat(residuals).to(out)
            rest[: len(joined)] = joined
        if self.terms is not None and factors is not None:
            rest = (self.terms * factors).sum(dim=-1) + rest
        values = torch.cat([exact, rest.to(out)])
        if self.delta:
            values = values.float().cumsum(0).to(out)
        return ids, values.double().tolist()


class _Older:
    """The older codec: a list of exact values, then a polynomial in the rank or its inverse."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.k, self.exact = _size(settings, "k"), _size(settings, "exact_k", least=0)
        self.bits = _index_bits(_size(settings, "vocab_size", most=1 << 32))
        degree = _size(settings, "polynomial_degree", least=0, most=_MOST_TERMS)
        if self.exact > self.k:
            raise SampleError(f"{CONFIG_FILE}: exact_k is {self.exact}, more than k, {self.k}")
        ranks = torch.arange(self.k - self.exact, dtype=torch.float32) + 1
        sign = -1 if settings.get("invert_polynomial", True) else 1
        terms = [ranks ** (sign * power) for power in range(degree + 1)]
        terms += [ranks.sqrt()] if settings.get("with_sqrt_term", False) else []
        self.terms = torch.stack(terms, dim=-1)  # [K - E, terms]

    def unpack(self, parts: Sequence[Any], what: str) -> tuple[list[int], list[float]]:
        """Ids and log-probabilities of one row."""
        per_word, mask = 64 // self.bits, (1 << self.bits) - 1
        words = [as_id(word, what) & (2**64 - 1) for word in as_list(parts[0], what)]
        ids = [(word >> (self.bits * place)) & mask for word in words for place in range(per_word)][: self.k]
        exact = [as_number(value, what) for value in as_list(parts[1], what)]
        factors = torch.tensor([as_number(value, what) for value in as_list(parts[2], what)], dtype=torch.float32)
        rest: list[float] = []
        if self.k > self.exact:
            if len(factors) != self.terms.shape[1]:
                raise _other_settings(what)
            rest = (self.terms * factors).sum(dim=-1).double().tolist()
        if len(ids) != self.k or len(exact) != self.exact:
            raise _other_settings(what)
        return ids, [*exact, *rest]


class _Bytes:
    """Bytes of a row, taken from the front."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._what = data, what

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self._data):
            raise _other_settings(self._what)
        taken, self._data = self._data[:count], self._data[count:]
        return taken

    def floats(self, count: int, dtype: torch.dtype) -> Tensor:
        """The next numbers."""
        if not count:
            return torch.zeros(0, dtype=dtype)
        return torch.frombuffer(bytearray(self.take(count * dtype.itemsize)), dtype=dtype)


def _unpack_bits(data: bytes, bits: int, count: int, what: str) -> list[int]:
    """Whole numbers of some bits each, the highest bit first."""
    if len(data) != (count * bits + 7) // 8:
        raise _other_settings(what)
    whole = int.from_bytes(data, "big") >> (len(data) * 8 - count * bits)
    mask = (1 << bits) - 1
    return [(whole >> (bits * place)) & mask for place in range(count - 1, -1, -1)]


def _bytes(values: Any, what: str) -> bytes:
    if isinstance(values, bytes):
        return values
    try:
        return bytes(as_list(values, what))
    except (TypeError, ValueError) as error:
        raise SampleError(f"{what} is {shown(values)}, expected bytes") from error


def _other_settings(what: str) -> SampleError:
    return SampleError(
        f"{what} was packed with other settings than {CONFIG_FILE} has; put the one beside it that it was made with"
    )


def _index_bits(vocabulary: int) -> int:
    return max(1, math.ceil(float(torch.log2(torch.tensor(vocabulary, dtype=torch.float32)))))


def _is_term(term: Any) -> bool:
    if isinstance(term, str):
        return term in _SPECIAL
    return isinstance(term, int) and not isinstance(term, bool) and abs(term) <= _MOST_TERMS


def _size(settings: Mapping[str, Any], name: str, *, least: int = 1, most: int = _MOST) -> int:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SampleError(f"{CONFIG_FILE}: {name} is {shown(value)}, expected a whole number from {least} to {most}")
    return value


def _dtype(settings: Mapping[str, Any], name: str) -> torch.dtype:
    value = settings.get(name, "float32")
    if not isinstance(value, str) or value not in _DTYPES:
        raise SampleError(f"{CONFIG_FILE}: {name} is {shown(value)}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[value]
