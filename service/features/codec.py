"""Users and items as bytes: what a store outside this process keeps.

An item's record begins with what a history needs of it, so that a look-up can take that part alone:

    version u8 | flags u8 | 0 u16 | bytes of the title u32 | crc of the beginning u32 | crc of the whole u32
    fold_C | title                                                     the beginning ends here
    collab_C | semantic_D

A user's:

    version u8 | flags u8 | likes u16 | likes in all u32 | bytes of the ids u32 | crc u32
    vector_C, unless there is none | time of each like f64 | ids of the likes, each u16 and its bytes

Everything is little-endian; bit 0 of the flags is "trained", bits 1 and 2 are the vectors' precision. Checksums cover
the id too, so that a record under another key is found out. Shapes: C = d_C, D = d_L.
"""

import struct
from dataclasses import dataclass
from enum import Enum
from typing import Literal
from zlib import crc32

import numpy as np

from models.features import Floats, ItemFeatures, UserFeatures

RECORD_VERSION = 1
HEADER_BYTES = 16

PrecisionName = Literal["float32", "bfloat16", "float16"]

_ITEM = struct.Struct("<BBHIII")
_USER = struct.Struct("<BBHIII")
_LENGTH = struct.Struct("<H")
_TRAINED = 1


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
            return np.frombuffer(data, "<f4", count, offset)
        if self is Precision.FLOAT16:
            return np.frombuffer(data, "<f2", count, offset).astype(np.float32)
        halves = np.frombuffer(data, "<u2", count, offset)
        return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


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
        beginning = precision.encode(item.fold_C) + title
        rest = precision.encode(item.collab_C) + precision.encode(item.semantic_D)
        flags = precision.value << 1 | item.trained
        first_crc = crc32(beginning, _salt(item.item_id, flags, len(title)))
        return _ITEM.pack(RECORD_VERSION, flags, 0, len(title), first_crc, crc32(rest, first_crc)) + beginning + rest

    def decode_item(self, item_id: str, record: bytes) -> ItemFeatures:
        """Return the item of a record.

        Raises:
            RecordError: it is no record of this item.
        """
        part, flags, end = self._beginning(item_id, record)
        precision = _PRECISIONS[flags >> 1]
        if len(record) != end + precision.width * (self.d_collab + self.d_model):
            raise RecordError(f"the record of item {item_id[:40]!r} has {len(record)} bytes; publish the bundle again")
        first_crc, whole_crc = _ITEM.unpack_from(record)[4:]
        if crc32(memoryview(record)[end:], first_crc) != whole_crc:
            raise RecordError(f"the record of item {item_id[:40]!r} is damaged; publish the bundle again")
        vectors = precision.decode(record, end, self.d_collab + self.d_model)
        return ItemFeatures(
            item_id,
            part.title,
            vectors[: self.d_collab],
            part.fold_C,
            vectors[self.d_collab :],
            trained=bool(flags & _TRAINED),
        )

    def decode_history_part(self, item_id: str, beginning: bytes) -> HistoryPart:
        """Return what the beginning of an item's record says, or the whole record.

        Raises:
            RecordError: it is no record of this item.
        """
        return self._beginning(item_id, beginning)[0]

    def _beginning(self, item_id: str, record: bytes) -> tuple[HistoryPart, int, int]:
        """Return the history part, the flags, and where the beginning ends."""
        if len(record) < HEADER_BYTES:
            raise RecordError(f"the record of item {item_id[:40]!r} has {len(record)} bytes; publish the bundle again")
        version, flags, zero, title_bytes, crc, _ = _ITEM.unpack_from(record)
        precision = _check_head("item", item_id, version, flags)
        title_at = HEADER_BYTES + precision.width * self.d_collab
        end = title_at + title_bytes
        if zero or len(record) < end:
            raise RecordError(f"the record of item {item_id[:40]!r} is cut short; publish the bundle again")
        if crc32(memoryview(record)[HEADER_BYTES:end], _salt(item_id, flags, title_bytes)) != crc:
            raise RecordError(f"the record of item {item_id[:40]!r} is damaged; publish the bundle again")
        fold_C = precision.decode(record, HEADER_BYTES, self.d_collab)
        return HistoryPart(item_id, record[title_at:end].decode(), fold_C), flags, end

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
        body = vector + times + ids
        flags = precision.value << 1 | (user.vector_C is not None)
        crc = crc32(body, _salt(user.user_id, flags, len(likes), user.history_total, len(ids)))
        return _USER.pack(RECORD_VERSION, flags, len(likes), user.history_total, len(ids), crc) + body

    def decode_user(self, user_id: str, record: bytes) -> UserFeatures:
        """Return the user of a record.

        Raises:
            RecordError: it is no record of this user.
        """
        if len(record) < HEADER_BYTES:
            raise RecordError(f"the record of user {user_id[:40]!r} has {len(record)} bytes; publish the bundle again")
        version, flags, count, total, ids_bytes, crc = _USER.unpack_from(record)
        precision = _check_head("user", user_id, version, flags)
        times_at = HEADER_BYTES + (precision.width * self.d_collab if flags & _TRAINED else 0)
        ids_at = times_at + 8 * count
        if len(record) != ids_at + ids_bytes:
            raise RecordError(f"the record of user {user_id[:40]!r} has {len(record)} bytes; publish the bundle again")
        if crc32(memoryview(record)[HEADER_BYTES:], _salt(user_id, flags, count, total, ids_bytes)) != crc:
            raise RecordError(f"the record of user {user_id[:40]!r} is damaged; publish the bundle again")
        return UserFeatures(
            user_id,
            precision.decode(record, HEADER_BYTES, self.d_collab) if flags & _TRAINED else None,
            _ids(record, ids_at, count),
            tuple(np.frombuffer(record, "<f8", count, times_at).tolist()),
            total,
        )


def _ids(record: bytes, at: int, count: int) -> tuple[str, ...]:
    ids = []
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(record, at)
        at += _LENGTH.size + length
        ids.append(record[at - length : at].decode())
    return tuple(ids)


def _check_head(kind: str, one_id: str, version: int, flags: int) -> Precision:
    precision = _PRECISIONS.get(flags >> 1)
    if version != RECORD_VERSION or precision is None:
        raise RecordError(
            f"the record of {kind} {one_id[:40]!r} has version {version} and flags {flags}; this release reads version"
            f" {RECORD_VERSION}: publish the bundle again"
        )
    return precision


def _salt(one_id: str, *numbers: int) -> int:
    """Return what a record's checksum starts with: the id and the header, so that neither can be another's."""
    return crc32(repr((RECORD_VERSION, one_id, *numbers)).encode())
