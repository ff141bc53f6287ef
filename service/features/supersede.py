"""What becomes of a bundle in Redis once another is current: its keys get an end, and nothing waits for it."""

from collections.abc import Callable, Iterable, Iterator

import redis

from service.features.keys import BUNDLES, POINTER, BundleKeys

_SCANNED = 2000  # keys that Redis looks at in one step; it answers others in between

# KEYS: meta, then those that get an end. ARGV: the end as meta has it, and as Redis takes it. In one step with the
# question whether the bundle is still superseded: another publish may be making it current again meanwhile.
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


def expire_superseded(client: "redis.Redis", current_id: str, tick: Callable[[int], None]) -> int:
    """Give every key of superseded bundles the time of its end; return how many keys.

    The time was fixed when the pointer was switched, so doing this twice, or half and then again, changes nothing.
    """
    done = 0
    for known in client.smembers(BUNDLES):
        bundle_id = known.decode() if isinstance(known, bytes) else known
        keys = BundleKeys(bundle_id)
        expires_at, expired = client.hmget(keys.meta, ["expires_at", "expired"])
        if not client.exists(keys.meta):
            client.srem(BUNDLES, bundle_id)
        if bundle_id == current_id or expires_at is None or expired is not None:
            continue
        if client.get(POINTER) == bundle_id.encode():  # it became current again meanwhile
            continue
        done += _expire(client, keys, expires_at, tick, done)
    return done


def _expire(
    client: "redis.Redis", keys: BundleKeys, expires_at: bytes | str, tick: Callable[[int], None], before: int
) -> int:
    """Give a bundle's keys their end, as long as it stays superseded, and its meta last; return how many got it."""
    moment = int(float(expires_at)) + 1
    count = 0
    meta = keys.meta.encode()
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
