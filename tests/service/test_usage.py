"""What engines tell of their work and memory, and that they forget when told."""

from pathlib import Path

import psutil
import pytest
import structlog

from models.loading import Bundle
from models.packs import ScoringGroup
from service.engines import device_memory
from service.engines.packed import PackedModel
from service.engines.supervised import SupervisedEngine
from tests.service.test_supervised import LIMITS, job, until_ready
from tests.service.worker_models import DIE, ObedientSource


def group_of(bundle: Bundle, candidates: int) -> ScoringGroup:
    tables = bundle.tables()
    assembler = bundle.assembler(bundle.encoder(), tables)
    items = [item for row in range(candidates) if (item := tables.item(f"i{row}")) is not None]
    return assembler.group(assembler.user(tables.user("u1"), items[:3], 3), items)


def test_every_token_of_a_prompt_is_computed_found_or_saved_by_packing(bundle: Bundle) -> None:
    model = PackedModel(bundle, bundle.model(), batch_tokens=512)
    group = group_of(bundle, 20)
    for _ in range(2):
        before = model.usage()
        model.score([group, group])
        after = model.usage()
        parts = [
            getattr(after, name) - getattr(before, name)
            for name in ("tokens", "tokens_cached", "tokens_saved_by_packing")
        ]
        assert sum(parts) == 2 * group.pack.tokens_alone
    assert after.tokens_cached >= len(group.pack.trunk)
    assert after.cache_bytes > 0 and after.device == "cpu"
    assert 2**20 < after.memory_bytes < after.memory_total_bytes <= psutil.virtual_memory().total
    model.forget()
    assert model.usage().cache_bytes == 0


@pytest.mark.anyio
async def test_a_workers_counts_come_with_its_answers_and_outlive_it() -> None:
    engine = SupervisedEngine(ObedientSource(), LIMITS, structlog.get_logger())
    await engine.start()
    await engine.ready()
    assert engine.usage().memory_bytes == engine.worker_pid
    await engine.distil([job(1), job(2)])
    assert engine.usage().forwards == 2
    engine.forget()  # after what was sent before, before what is sent after
    [answer] = await engine.distil([job(3)])
    assert not isinstance(answer, Exception) and answer[0][0] == 1003
    counted = engine.usage().forwards
    with pytest.raises(Exception, match="restarted"):
        await engine.distil([job(4, DIE)])
    await until_ready(engine)
    assert engine.usage().forwards == counted and engine.usage().memory_bytes == engine.worker_pid
    await engine.close()


def test_a_containers_limit_counts_where_it_is_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "pod" / "container"
    own.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/pod/container\n")
    monkeypatch.setattr(device_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(device_memory, "OWN_CGROUP", tmp_path / "cgroup")
    total = psutil.virtual_memory().total
    assert device_memory.host_memory()[1] == total
    (own / "memory.max").write_text("max\n")
    (own.parent / "memory.max").write_text(f"{100 * 2**20}\n")
    (own.parent / "memory.current").write_text(f"{70 * 2**20}\n")
    (own.parent / "memory.stat").write_text(f"anon 5\ninactive_file {10 * 2**20}\n")
    assert device_memory.host_memory() == (40 * 2**20, 100 * 2**20)
    monkeypatch.setattr(device_memory, "OWN_CGROUP", tmp_path / "none")
    assert device_memory.host_memory()[1] == total
