"""What becomes of a bundle in Redis once another is current: its keys get an end when no server serves it any more."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import redis

from service.features.keys import BundleKeys, Keys

_SCANNED = 2000  # keys that Redis looks at in one step; it answers others in between
_LEAST_S = 60  # from the moment when a late end is fixed

# KEYS: meta. ARGV: since when it may end, as meta has it; the end as Redis takes it. From now on keys that are written
# anew get the end at once.
_BEGIN = """
if redis.call('HGET', KEYS[1], 'expires_at') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'ends', ARGV[2])
return 1
"""
# KEYS: meta, then those that get an end. In one step with the question whether the bundle is still superseded: another
# publish may be making it current again meanwhile.
_END = """
if redis.call('HGET', KEYS[1], 'expires_at') ~= ARGV[1] then return 0 end
for place = 2, #KEYS do redis.call('EXPIREAT', KEYS[place], ARGV[2]) end
return 1
"""
_ALL_ENDED = """
if redis.call('HGET', KEYS[1], 'expires_at') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'expired', 1)
return redis.call('EXPIREAT', KEYS[1], ARGV[2])
"""
# KEYS: impressions. ARGV: seconds. Versions before kept an impression as long as an event.
_SHORTEN = """
for _, key in ipairs(KEYS) do
  if redis.call('TTL', key) > tonumber(ARGV[1]) then redis.call('EXPIRE', key, ARGV[1]) end
end
"""


def served_somewhere(client: "redis.Redis", keys: Keys) -> set[str]:
    """Return the ids of the bundles that servers say they serve."""
    members = cast("list[bytes]", client.zrangebyscore(keys.serving, time.time(), "+inf"))
    return {_text(member).partition(":")[0] for member in members}


def expire_superseded(client: "redis.Redis", keys: Keys, tick: Callable[[int], None]) -> int:
    """Give every key of superseded bundles that nobody serves the time of its end; return how many keys.

    A bundle that is served still is left for later: its servers ask for this every minute. Doing this twice, or half
    and then again, changes nothing.
    """
    done = 0
    served = served_somewhere(client, keys)
    for bundle_id in map(_text, client.smembers(keys.bundles)):
        bundle = keys.bundle(bundle_id)
        expires_at, expired = client.hmget(bundle.meta, ["expires_at", "expired"])
        if not client.exists(bundle.meta):
            client.srem(keys.bundles, bundle_id)
        if expires_at is None or expired is not None or bundle_id in served:
            continue
        if client.get(keys.pointer) == bundle_id.encode():  # it became current again meanwhile
            continue
        done += _expire(client, bundle, expires_at, tick, done)
    return done


def remove_stale_counts(client: "redis.Redis", keys: Keys, tick: Callable[[int], None]) -> None:
    """Remove tables of counts in whose place others began, after Redis had lost data."""
    for bundle_id in map(_text, client.smembers(keys.bundles)):
        bundle = keys.bundle(bundle_id)
        stale, number = client.hmget(bundle.meta, ["stale", "counts"])
        if stale is not None and number is not None:
            older = (
                key
                for key in client.scan_iter(f"{bundle.counts}*", _SCANNED)
                if int(_text(key).removeprefix(bundle.counts).partition(":")[0]) < int(number)
            )
            for some in _chunks(older):
                client.unlink(*some)
                tick(len(some))
            client.hdel(bundle.meta, "stale")


def shorten_impressions(client: "redis.Redis", keys: Keys, seconds: float, tick: Callable[[int], None]) -> None:
    """Let no impression be kept longer than `seconds` from now."""
    for some in _chunks(client.scan_iter(f"{keys.impression}*", _SCANNED)):
        client.eval(_SHORTEN, len(some), *some, max(1, round(seconds)))
        tick(len(some))


def _expire(
    client: "redis.Redis", keys: BundleKeys, expires_at: bytes | str, tick: Callable[[int], None], before: int
) -> int:
    """Give a bundle's keys their end, as long as it stays superseded, and its meta last; return how many got it."""
    moment = int(max(float(expires_at), time.time() + _LEAST_S if float(expires_at) < time.time() else 0.0)) + 1
    count = 0
    meta = keys.meta.encode()
    if not client.eval(_BEGIN, 1, keys.meta, expires_at, moment):
        return 0
    for some in _chunks(key for key in client.scan_iter(f"{keys.prefix}*", _SCANNED) if key != meta):
        if not client.eval(_END, 1 + len(some), keys.meta, *some, expires_at, moment):
            return count
        count += len(some)
        tick(before + count)
    return count + int(bool(client.eval(_ALL_ENDED, 1, keys.meta, expires_at, moment)))


def _chunks(keys: Iterable[bytes]) -> Iterator[list[bytes]]:
    waiting: list[bytes] = []
    for key in keys:
        waiting.append(key)
        if len(waiting) == _SCANNED:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
