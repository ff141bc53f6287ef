import time
from pathlib import Path

import pytest
from redis import Redis
from typer.testing import CliRunner

import service.features.publish as publishing
from models.loading import Bundle
from service.cli import app
from service.features.client import open_publisher
from service.features.keys import BundleKeys, Keys
from service.features.publish import Published, Publisher, PublishError, PublishOptions
from service.features.supersede import expire_superseded
from tests.redis_server import RedisServer, redis_server
from tests.service.published import publish
from tests.tiny import tiny_bundle

KEYS = Keys()


@pytest.fixture(scope="session")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "newer", seed=7)


class KilledError(Exception):
    """Stands for a kill: nothing runs after it."""


def publish_killed_after(server: RedisServer, bundle: Bundle, ticks: int, **options: object) -> None:
    left = ticks

    def tick(what: str, done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError

    client = open_publisher(server.url)
    with pytest.raises(KilledError):
        Publisher(client, bundle, PublishOptions(batch=7, **options), tick).publish()  # type: ignore[arg-type]
    client.close()


def test_the_pointer_moves_last_and_a_rerun_goes_on(redis: RedisServer, bundle: Bundle) -> None:
    publish_killed_after(redis, bundle, 3)
    with redis.client() as client:
        meta = BundleKeys(bundle.id).meta
        assert client.get(KEYS.pointer) is None and client.hget(meta, "complete") is None
        assert client.hget(meta, "items_done") == b"28"
        client.delete(BundleKeys(bundle.id).items + "i0")  # a rerun that began anew would write it
        with pytest.raises(PublishError, match="'i0'"):
            publish(redis, bundle)
        assert client.get(KEYS.pointer) is None
        assert publish(redis, bundle).items == 40  # the loss sent it back to the start
        assert client.get(KEYS.pointer) == bundle.id.encode()
        assert client.hget(meta, "complete") == b"1"


def test_a_second_publish_writes_nothing_and_again_writes_all(redis: RedisServer, bundle: Bundle) -> None:
    assert not publish(redis, bundle).already
    with redis.client() as client:
        client.config_resetstat()
        assert publish(redis, bundle).already
        assert "cmdstat_set" not in client.info("commandstats")
        size = client.strlen(BundleKeys(bundle.id).items + "i0")
        assert not publish(redis, bundle, again=True, precision="float16").already
        assert client.strlen(BundleKeys(bundle.id).items + "i0") < size


def ttls(client: Redis, keys: BundleKeys) -> list[int]:
    """Return the seconds that each key of a bundle has left, -1 for no end; a bundle without keys has none to tell."""
    found = [client.ttl(key) for key in client.scan_iter(f"{keys.prefix}*")]
    assert len(found) >= 20 + 40 + 1
    return found


def test_a_superseded_bundle_expires_and_going_back_to_it_ends_that(
    redis: RedisServer, bundle: Bundle, newer: Bundle
) -> None:
    publish(redis, bundle)
    published = publish(redis, newer, keep_s=1000)
    old, new = BundleKeys(bundle.id), BundleKeys(newer.id)
    with redis.client() as client:
        assert published.expiring == 20 + 40 + 1
        assert all(0 < ttl <= 1001 for ttl in ttls(client, old))
        assert client.hget(old.meta, "complete") == b"1"  # servers that have not switched still look up in it
        assert all(ttl == -1 for ttl in ttls(client, new))
        assert publish(redis, bundle).expiring == 61
        assert client.get(KEYS.pointer) == bundle.id.encode()
        assert all(ttl == -1 for ttl in ttls(client, old))
        assert all(ttl > 0 for ttl in ttls(client, new))


def test_a_bundle_made_current_again_while_it_is_given_its_end_keeps_all_its_keys(
    redis: RedisServer, bundle: Bundle, newer: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.features.supersede._SCANNED", 10)
    publish(redis, bundle)
    again: list[Published] = []

    def tick(what: str, done: int, total: int) -> None:
        if what == "expiring" and not again:
            again.append(publish(redis, bundle))

    publisher = open_publisher(redis.url)
    Publisher(publisher, newer, PublishOptions(), tick).publish()
    publisher.close()
    assert len(again) == 1
    with redis.client() as client:
        assert client.get(KEYS.pointer) == bundle.id.encode()
        assert all(ttl == -1 for ttl in ttls(client, BundleKeys(bundle.id)))


def test_expiring_that_was_cut_short_is_finished_by_a_rerun(
    redis: RedisServer, bundle: Bundle, newer: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(redis, bundle)

    def killed(*_: object) -> int:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "expire_superseded", killed)
        with pytest.raises(KilledError):
            publish(redis, newer)
    with redis.client() as client:
        assert client.ttl(BundleKeys(bundle.id).meta) == -1
        assert publish(redis, newer).already
        assert all(ttl > 0 for ttl in ttls(client, BundleKeys(bundle.id)))


def test_a_deleted_user_is_left_out_even_when_deleted_while_they_are_written(
    redis: RedisServer, bundle: Bundle
) -> None:
    with redis.client() as client:
        client.hset(KEYS.deleted, "u3", "1800000000.0")

        def tick(what: str, done: int, total: int) -> None:
            if what == "users" and done == 20:
                client.hset(KEYS.deleted, "u5", "1800000000.0")

        publisher = open_publisher(redis.url)
        published = Publisher(publisher, bundle, PublishOptions(), tick).publish()
        publisher.close()
        assert (published.users, published.deleted) == (18, 2)
        assert client.exists(*(BundleKeys(bundle.id).users + one for one in ("u3", "u5"))) == 0


def test_a_user_who_came_back_after_a_deletion_is_published_with_a_bundle_that_learned_from_later_rows_alone(
    redis: RedisServer, tmp_path: Path
) -> None:
    later = tiny_bundle(tmp_path / "later", since=1_600_000_000.0)
    with redis.client() as client:
        client.hset(KEYS.deleted, mapping={"u3": "1599999999.0", "u4": "1600000000.0"})
        published = publish(redis, later)
        assert (published.users, published.deleted) == (19, 1)
        keys = [BundleKeys(later.id).users + one for one in ("u3", "u4")]
        assert [client.exists(key) for key in keys] == [1, 0]


def test_too_little_memory_is_one_line_and_the_pointer_stays(bundle: Bundle) -> None:
    with redis_server("--maxmemory-policy", "noeviction") as server, server.client() as client:
        client.set(KEYS.pointer, "as it was")

        def full(*_: object) -> None:
            client.config_set("maxmemory", 1)

        publisher = open_publisher(server.url)
        with pytest.raises(PublishError, match="no memory left"):
            Publisher(publisher, bundle, PublishOptions(batch=5), full).publish()
        publisher.close()
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 10_000)
        client.delete(BundleKeys(bundle.id).meta)
        told = CliRunner().invoke(app, ["publish", "--bundle", str(bundle.folder), "--redis", server.url])
        assert told.exit_code == 2, told.output
        assert "maxmemory" in told.output and "Traceback" not in told.output
        assert client.get(KEYS.pointer) == b"as it was"


def test_a_read_only_redis_and_one_that_is_away_are_one_line(
    redis: RedisServer, bundle: Bundle, tmp_path: Path
) -> None:
    command = ["publish", "--bundle", str(bundle.folder), "--redis"]
    with redis_server("--replicaof", "127.0.0.1", "1") as replica:
        told = CliRunner().invoke(app, [*command, replica.url])
    assert told.exit_code == 2 and "read-only replica" in told.output
    told = CliRunner().invoke(app, [*command, f"unix://{tmp_path}/none"])
    assert told.exit_code == 2 and "cannot be reached" in told.output
    told = CliRunner().invoke(app, [*command, "http://user:secret@host"])
    assert told.exit_code == 2 and "secret" not in told.output


def test_the_command_says_what_it_did(redis: RedisServer, bundle: Bundle) -> None:
    command = ["publish", "--bundle", str(bundle.folder), "--redis", redis.url]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0 and "20 users, 40 items" in told.output
    assert "already" in CliRunner().invoke(app, command).output
    with redis.client() as client:
        assert client.smembers(KEYS.bundles) == {bundle.id.encode()}


def test_a_staged_bundle_is_whole_and_the_pointer_stays_until_it_is_published(
    redis: RedisServer, bundle: Bundle, newer: Bundle
) -> None:
    publish(redis, bundle)
    old, new = BundleKeys(bundle.id), BundleKeys(newer.id)
    with redis.client() as client:
        staged = publish(redis, newer, stage=True)
        assert (staged.current, staged.already, staged.expiring) == (False, False, 0)
        assert client.get(KEYS.pointer) == bundle.id.encode()
        assert client.hget(new.meta, "complete") == b"1" and client.hget(new.meta, "counts") is not None
        assert all(client.ttl(key) == -1 for key in client.scan_iter("*"))
        assert publish(redis, newer, stage=True).already
        client.config_resetstat()
        published = publish(redis, newer)  # nothing is written again
        assert published.current and "cmdstat_set" not in {
            name for name, one in client.info("commandstats").items() if one["calls"] > 1
        }
        assert client.get(KEYS.pointer) == newer.id.encode()
        assert all(client.ttl(key) > 0 for key in client.scan_iter(f"{old.prefix}*"))
        assert client.exists(new.items + "i0")


def test_a_staged_bundle_can_be_withdrawn_and_the_current_one_cannot(
    redis: RedisServer, bundle: Bundle, newer: Bundle
) -> None:
    publish(redis, bundle)
    command = ["publish", "--redis", redis.url, "--bundle"]
    told = CliRunner().invoke(app, [*command, str(newer.folder), "--stage"])
    assert told.exit_code == 0 and "is staged on" in told.output
    assert CliRunner().invoke(app, [*command, str(newer.folder), "--unstage"]).exit_code == 0
    refused = CliRunner().invoke(app, [*command, str(bundle.folder), "--unstage"])
    assert refused.exit_code == 2 and "is the current one" in refused.output
    with redis.client() as client:
        assert all(client.ttl(key) > 0 for key in client.scan_iter(f"{BundleKeys(newer.id).prefix}*"))
        assert all(client.ttl(key) == -1 for key in client.scan_iter(f"{BundleKeys(bundle.id).prefix}*"))


@pytest.mark.parametrize("damage", ["record", "lost", "another type", "meta", "pointer", "bundles", "deleted"])
def test_publishing_the_same_bundle_repairs_what_is_damaged_and_writes_nothing_else(
    redis: RedisServer, bundle: Bundle, damage: str
) -> None:
    publish(redis, bundle, precision="float16")
    keys = BundleKeys(bundle.id)
    with redis.client() as client:
        whole = {key: client.dump(key) for key in client.scan_iter("*") if not key.endswith(b":meta")}
        if damage == "record":
            client.setrange(keys.items + "i3", 60, b"damaged")
        elif damage == "lost":
            client.delete(keys.users + "u3")
        else:
            key = {"meta": keys.meta, "pointer": KEYS.pointer, "bundles": KEYS.bundles, "deleted": KEYS.deleted}
            named = key.get(damage, keys.items + "i3")
            client.delete(named)
            client.lpush(named, "x")
        published = publish(redis, bundle, precision="float16")
        assert (published.current and not published.already) or damage in ("bundles", "deleted")
        assert published.repaired == (1 if damage in ("record", "lost", "another type") else 0)
        again = {key: client.dump(key) for key in client.scan_iter("*") if not key.endswith(b":meta")}
        counted = {f"{KEYS.tables}".encode()}  # a meta that was lost begins another table of counts
        assert {key: value for key, value in again.items() if key not in counted} == {
            key: value for key, value in whole.items() if key not in counted
        }
        assert client.get(KEYS.pointer) == bundle.id.encode() and client.hget(keys.meta, "complete") == b"1"


def test_records_of_another_release_or_of_a_damaged_meta_are_written_anew(redis: RedisServer, bundle: Bundle) -> None:
    publish(redis, bundle)
    with redis.client() as client:
        for damaged in ({"version": "1"}, {"users": b"\xff"}, {"bundle_id": "x"}, {"precision": "float128"}):
            client.hset(BundleKeys(bundle.id).meta, mapping=damaged)
            assert not publish(redis, bundle).already
            assert publish(redis, bundle).already


def test_fleets_with_prefixes_of_their_own_do_not_meet(redis: RedisServer, bundle: Bundle, newer: Bundle) -> None:
    publish(redis, bundle, keys=Keys("one"))
    with redis.client() as client:
        first = {key: client.dump(key) for key in client.scan_iter("*")}
        assert all(key.startswith(b"one:") for key in first)
        publish(redis, newer, keys=Keys("other"))
        publish(redis, bundle, keys=Keys("other"), keep_s=0)
        assert {key: client.dump(key) for key in client.scan_iter("one:*")} == first
        assert all(client.ttl(key) == -1 for key in first)
        assert client.get("one:current") == client.get("other:current") == bundle.id.encode()


def test_the_command_takes_the_fleets_prefix(
    redis: RedisServer, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["publish", "--bundle", str(bundle.folder), "--redis", redis.url]
    assert CliRunner().invoke(app, [*command, "--prefix", "books"]).exit_code == 0
    monkeypatch.setenv("SELLA_REDIS_PREFIX", "films")
    assert CliRunner().invoke(app, command).exit_code == 0
    with redis.client() as client:
        assert {key.partition(b":")[0] for key in client.scan_iter("*")} == {b"books", b"films"}
    for prefix in ("a:b", "a*", "", "x" * 65):
        refused = CliRunner().invoke(app, [*command, "--prefix", prefix])
        assert refused.exit_code == 2 and "no key prefix" in refused.output


def test_a_bundle_that_a_server_serves_keeps_its_keys_until_it_stops(
    redis: RedisServer, bundle: Bundle, newer: Bundle
) -> None:
    publish(redis, bundle)
    old = BundleKeys(bundle.id)
    with redis.client() as client:
        client.zadd(KEYS.serving, {f"{bundle.id}:server": time.time() + 100, f"{newer.id}:gone": time.time() - 1})
        assert publish(redis, newer, keep_s=0).expiring == 0
        assert all(client.ttl(key) == -1 for key in client.scan_iter(f"{old.prefix}*"))
        client.zrem(KEYS.serving, f"{bundle.id}:server")
        assert expire_superseded(client, KEYS, lambda _: None) == 61
        assert all(0 < client.ttl(key) <= 62 for key in client.scan_iter(f"{old.prefix}*"))


def test_an_eviction_policy_is_warned_of(bundle: Bundle) -> None:
    with redis_server("--maxmemory-policy", "allkeys-lru") as server:
        told = CliRunner().invoke(app, ["publish", "--bundle", str(bundle.folder), "--redis", server.url])
    assert told.exit_code == 0 and "allkeys-lru" in told.stderr and "noeviction" in told.stderr


@pytest.mark.parametrize("options", ["?nonsense=1", "?db=x", "?socket_timeout=soon", "?db=1&db=2", "/films"])
def test_an_address_that_cannot_be_used_is_one_line(bundle: Bundle, options: str) -> None:
    url = f"redis://:secret@localhost:6379{options}"
    told = CliRunner().invoke(app, ["publish", "--bundle", str(bundle.folder), "--redis", url])
    assert told.exit_code == 2 and told.output.count("\n") == 1 and "secret" not in told.output
