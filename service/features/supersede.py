"""What becomes of a bundle in Redis once another is current: its keys get an end, and nothing waits for it."""

from collections.abc import Callable, Iterable

import redis

from service.features.keys import BUNDLES, POINTER, BundleKeys

_SCANNED = 2000  # keys that Redis looks at in one step; it answers others in between


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
        moment = int(float(expires_at)) + 1
        done += _expire(client, (key for key in client.scan_iter(f"{keys.prefix}*", _SCANNED)), moment, tick, done)
        client.hset(keys.meta, "expired", 1)
        client.expireat(keys.meta, moment)
    return done


def _expire(client: "redis.Redis", keys: Iterable[bytes], moment: int, tick: Callable[[int], None], before: int) -> int:
    count = 0
    waiting: list[bytes] = []

    def send() -> None:
        with client.pipeline(transaction=False) as pipe:
            for key in waiting:
                pipe.expireat(key, moment)
            pipe.execute()
        waiting.clear()
        tick(before + count)

    for key in keys:
        count += 1
        waiting.append(key)
        if len(waiting) == _SCANNED:
            send()
    if waiting:
        send()
    return count
