"""Users and items as bytes: what a store outside this process keeps.

An item's record begins with what a history needs of it, so that a look-up can take that part alone:

    version u8 | flags u8 | 0 u16 | bytes of the title u32 | checksum of the beginning u32 | of the whole u32
    title | fold_C                                                     the beginning ends here
    collab_C | semantic_D | impressions u64 | positives u64

A user's:

    version u8 | flags u8 | likes u16 | likes in all u32 | bytes of the ids u32 | checksum u32
    vector_C, unless there is none | time of each like f64 | ids of the likes, each u16 and its bytes
    impressions u64 | positives u64 | time of the user's first row f64

Everything is little-endian; bit 0 of the flags is "trained", bits 1 and 2 are the vectors' precision. Checksums cover
the id too, so that a record under another key is found out. Shapes: C = d_C, D = d_L.
"""

import struct
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np
from xxhash import xxh3_64_intdigest

from models.features import Floats, ItemFeatures, UserFeatures
from models.fusion import Counts

RECORD_VERSION = 3
HEADER_BYTES = 16

PrecisionName = Literal["float32", "bfloat16", "float16"]

_ITEM = struct.Struct("<BBHI")
_USER = struct.Struct("<BBHII")
_SUM = struct.Struct("<I")
_LENGTH = struct.Struct("<H")
_COUNTS = struct.Struct("<QQ")
_USER_END = struct.Struct("<QQd")
_TRAINED = 1
_FLOAT32, _FLOAT16, _HALVES = np.dtype("<f4"), np.dtype("<f2"), np.dtype("<u2")


class RecordError(ValueError):
    """Bytes that are no record of what was asked for, or numbers that do not fit into one."""


class Precision(Enum):
    """How the numbers of a vector are kept; the value is the flags' code."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2

    @classmethod
    def named(cls, name: PrecisionName) -> "Precision":
        """Return the precision of a name."""
        return cls[name.upper()]

    @property
    def width(self) -> int:
        """Bytes a number."""
        return 4 if self is Precision.FLOAT32 else 2

    def encode(self, vector: Floats) -> bytes:
        """Return a vector's bytes; float32 keeps every bit.

        Raises:
            RecordError: it holds what is not finite in this precision.
        """
        if self is Precision.FLOAT32:
            data = vector.astype("<f4").tobytes()
        elif self is Precision.FLOAT16:
            with np.errstate(over="ignore"):
                data = vector.astype("<f2").tobytes()
        else:
            bits = vector.astype("<f4").view("<u4").astype(np.uint64)
            data = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # to nearest, ties to even
        if not np.isfinite(self.decode(data, 0, len(vector))).all():
            raise RecordError(f"a vector holds numbers that are not finite in {self.name.lower()}; publish in float32")
        return data

    def decode(self, data: bytes, offset: int, count: int) -> Floats:
        """Return `count` numbers from `offset` on."""
        if self is Precision.FLOAT32:
            return np.frombuffer(data, _FLOAT32, count, offset)
        if self is Precision.FLOAT16:
            return np.frombuffer(data, _FLOAT16, count, offset).astype(np.float32)
        bits = np.frombuffer(data, _HALVES, count, offset).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)


_PRECISIONS = {one.value: one for one in Precision}


@dataclass(frozen=True, slots=True)
class HistoryPart:
    """A `HistoryItem`: the beginning of an item's record. It has no vectors for a candidate's slots."""

    item_id: str
    title: str
    fold_C: Floats


@dataclass(frozen=True, slots=True)
class Codec:
    """Writes and reads the records of bundles with these dimensions."""

    d_collab: int
    d_model: int

    def encode_item(self, item: ItemFeatures, precision: Precision) -> bytes:
        """Return an item's record.

        Raises:
            RecordError: its numbers do not fit the precision.
        """
        title = item.title.encode()
        beginning = title + precision.encode(item.fold_C)
        body = beginning + precision.encode(item.collab_C) + precision.encode(item.semantic_D)
        body += _COUNTS.pack(*item.counts)
        head = _ITEM.pack(RECORD_VERSION, precision.value << 1 | item.trained, 0, len(title))
        head += _SUM.pack(_checksum(item.item_id, head, beginning))
        return head + _SUM.pack(_checksum(item.item_id, head, body)) + body

    def decode_item(self, item_id: str, record: bytes) -> ItemFeatures:
        """Return the item of a record.

        Raises:
            RecordError: it is no record of this item.
        """
        flags, precision, end = _item_head(item_id, record)
        numbers = 2 * self.d_collab + self.d_model
        counts_at = end + precision.width * numbers
        if len(record) != counts_at + _COUNTS.size:
            raise _wrong("an item", f"has {len(record)} bytes")
        if _checksum(item_id, record[:12], memoryview(record)[HEADER_BYTES:]) != _SUM.unpack_from(record, 12)[0]:
            raise _wrong("an item", "is damaged")
        vectors = precision.decode(record, end, numbers)
        return ItemFeatures(
            item_id,
            record[HEADER_BYTES:end].decode(),
            vectors[self.d_collab : 2 * self.d_collab],
            vectors[: self.d_collab],
            vectors[2 * self.d_collab :],
            (flags & _TRAINED) == _TRAINED,
            Counts(*_COUNTS.unpack_from(record, counts_at)),
        )

    def decode_history_part(self, item_id: str, beginning: bytes) -> HistoryPart:
        """Return what the beginning of an item's record says, or the whole record.

        Raises:
            RecordError: it is no record of this item.
        """
        _, precision, title_end = _item_head(item_id, beginning)
        end = title_end + precision.width * self.d_collab
        if len(beginning) < end:
            raise _wrong("an item", "is cut short")
        if (
            _checksum(item_id, beginning[:8], memoryview(beginning)[HEADER_BYTES:end])
            != _SUM.unpack_from(beginning, 8)[0]
        ):
            raise _wrong("an item", "is damaged")
        fold_C = precision.decode(beginning, title_end, self.d_collab)
        return HistoryPart(item_id, beginning[HEADER_BYTES:title_end].decode(), fold_C)

    def encode_user(self, user: UserFeatures, precision: Precision) -> bytes:
        """Return a user's record.

        Raises:
            RecordError: the vector does not fit the precision, or the history is longer than a record counts.
        """
        likes = [one.encode() for one in user.history]
        if len(likes) > 0xFFFF or user.history_total > 0xFFFFFFFF:
            raise RecordError(f"user {user.user_id[:40]!r} has {len(likes)} stored likes; a record holds 65,535")
        vector = b"" if user.vector_C is None else precision.encode(user.vector_C)
        times = np.asarray(user.history_times, "<f8").tobytes()
        ids = b"".join(_LENGTH.pack(len(one)) + one for one in likes)
        body = vector + times + ids + _USER_END.pack(*user.counts, user.since)
        flags = precision.value << 1 | (user.vector_C is not None)
        head = _USER.pack(RECORD_VERSION, flags, len(likes), user.history_total, len(ids))
        return head + _SUM.pack(_checksum(user.user_id, head, body)) + body

    def decode_user(self, user_id: str, record: bytes) -> UserFeatures:
        """Return the user of a record.

        Raises:
            RecordError: it is no record of this user.
        """
        if len(record) < HEADER_BYTES:
            raise _wrong("a user", f"has {len(record)} bytes")
        version, flags, count, total, ids_bytes = _USER.unpack_from(record)
        precision = _precision("a user", version, flags)
        times_at = HEADER_BYTES + (precision.width * self.d_collab if flags & _TRAINED else 0)
        ids_at = times_at + 8 * count
        end_at = ids_at + ids_bytes
        if len(record) != end_at + _USER_END.size:
            raise _wrong("a user", f"has {len(record)} bytes")
        if _checksum(user_id, record[:12], memoryview(record)[HEADER_BYTES:]) != _SUM.unpack_from(record, 12)[0]:
            raise _wrong("a user", "is damaged")
        impressions, positives, since = _USER_END.unpack_from(record, end_at)
        return UserFeatures(
            user_id,
            precision.decode(record, HEADER_BYTES, self.d_collab) if flags & _TRAINED else None,
            _ids(record, ids_at, count),
            tuple(np.frombuffer(record, "<f8", count, times_at).tolist()),
            total,
            Counts(impressions, positives),
            since,
        )


def _ids(record: bytes, at: int, count: int) -> tuple[str, ...]:
    ids = []
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(record, at)
        at += _LENGTH.size + length
        ids.append(record[at - length : at].decode())
    return tuple(ids)


def _item_head(item_id: str, record: bytes) -> tuple[int, Precision, int]:
    """Return an item's flags and precision, and where its title ends."""
    if len(record) < HEADER_BYTES:
        raise _wrong("an item", f"has {len(record)} bytes")
    version, flags, zero, title_bytes = _ITEM.unpack_from(record)
    if zero:
        raise _wrong("an item", "is damaged")
    return flags, _precision("an item", version, flags), HEADER_BYTES + title_bytes


def _precision(whose: str, version: int, flags: int) -> Precision:
    precision = _PRECISIONS.get(flags >> 1)
    if version != RECORD_VERSION or precision is None:
        raise _wrong(whose, f"has version {version} and flags {flags}, and this release reads version {RECORD_VERSION}")
    return precision


def _wrong(whose: str, what: str) -> RecordError:
    """Return the error, which reaches the log and so does not say which user or item."""
    return RecordError(f"the record of {whose} {what}; publish the bundle again")


def _checksum(one_id: str, head: bytes, body: bytes | memoryview) -> int:
    """Return the checksum of a record or its beginning; `head` is all of the header before it.

    XXH3's lower half: of a record of Qwen2-7B's sizes a CRC takes ten times as long, a quarter of its whole reading.
    """
    return xxh3_64_intdigest(body, xxh3_64_intdigest(head + one_id.encode())) & 0xFFFFFFFF
