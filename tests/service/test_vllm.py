"""What vLLM is told: its prompts and its arguments. Its answers are tested in `tests/vllm`."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import structlog
import torch
from typer.testing import CliRunner

from models.assembly import Assembler
from models.loading import Bundle
from models.packs import ScoringGroup
from models.projection import Projections, Verbatim
from models.scoring_model import ScoringModel
from models.segments import SlotKind
from models.template import PromptKind, Title
from service.bundles.handle import open_parts
from service.cli import app
from service.engines.choice import core_config, open_engine
from service.engines.lifecycle import Supervision
from service.engines.merged import MergedSource
from service.engines.packed import PackedModel, PackedSource
from service.engines.protocol import BundlePlace, EngineBrokenError, EngineState, EngineUnavailableError, JobFailedError
from service.engines.supervised import SupervisedEngine
from service.engines.vllm import VllmEngine
from service.engines.vllm_core import VllmCore
from service.engines.vllm_prompts import MixedPrompt, PromptWriter
from service.settings import Settings, SettingsError, load_settings
from tests.service.worker_models import ObedientSource
from tests.tiny import D_MODEL


@pytest.fixture(scope="module")
def assembler(bundle: Bundle) -> Assembler:
    return bundle.assembler(bundle.encoder(), bundle.tables())


@pytest.fixture(scope="module")
def group(bundle: Bundle, assembler: Assembler) -> ScoringGroup:
    tables = bundle.tables()
    items = [item for row in (1, 39, 2) if (item := tables.item(f"i{row}")) is not None]
    return assembler.group(assembler.user(tables.user("u1"), items[:2], 2), items)


@pytest.fixture(scope="module")
def projections(bundle: Bundle) -> Projections:
    return bundle.projections()


def slots(prompt: MixedPrompt) -> list[int]:
    return [index for index, is_token in enumerate(prompt.is_token) if not is_token]


def test_a_prompt_is_trunk_and_branch_with_vectors_in_its_slots_and_zeros_elsewhere(
    group: ScoringGroup, projections: Projections
) -> None:
    prompts = PromptWriter(projections, torch.float32, "weights").write(group)
    for index, (prompt, branch) in enumerate(zip(prompts, group.pack.branches, strict=True)):
        whole = group.pack.trunk + branch.segment
        assert prompt.token_ids == list(whole.token_ids)  # never padded
        assert slots(prompt) == sorted(where for _, where in whole.slots)
        vectors = {
            SlotKind.USER: projections.collab(torch.from_numpy(group.user_1C))[0],
            SlotKind.ITEM: projections.collab(torch.from_numpy(group.item_KC))[index],
            SlotKind.WARM: projections.warm(torch.from_numpy(group.semantic_KD))[index],
        }
        for kind, where in whole.slots:
            torch.testing.assert_close(prompt.embeds_TD[where], vectors[kind])
        assert not prompt.embeds_TD[prompt.is_token].any()
        assert prompt.cache_salt == "weights"


def test_vectors_come_in_the_models_type(group: ScoringGroup, projections: Projections) -> None:
    [first, *_] = PromptWriter(projections, torch.bfloat16, "weights").write(group)
    assert first.embeds_TD.dtype == torch.bfloat16


def test_a_zero_vector_puts_the_slots_into_the_salt(group: ScoringGroup) -> None:
    wide = np.ones((len(group.pack.branches), D_MODEL), np.float32)
    zero = ScoringGroup(group.pack, np.zeros((1, D_MODEL), np.float32), wide, wide)
    writer = PromptWriter(Verbatim(), torch.float32, "weights")
    salts = {prompt.cache_salt for prompt in writer.write(zero)}
    assert len(salts) == 1 and "weights" not in salts  # the trunk is still shared
    assert {prompt.cache_salt for prompt in writer.write(replace(zero, user_1C=wide[:1]))} == {"weights"}


def test_vectors_that_are_not_finite_are_refused(group: ScoringGroup, projections: Projections) -> None:
    writer = PromptWriter(projections, torch.float32, "weights")
    with pytest.raises(ArithmeticError, match="user vector is not finite"):
        writer.write(replace(group, user_1C=group.user_1C * np.float32("inf")))


def test_settings_become_vllms_arguments(bundle: Bundle, assembler: Assembler, tmp_path: Path) -> None:
    settings = Settings(
        bundle=bundle.folder,
        engine="vllm",
        vllm_weights=tmp_path,
        tensor_parallel=4,
        data_parallel=2,
        vllm_gpu_memory=0.8,
        vllm_kv_gib=1.5,
        vllm_eager=True,
    )
    args = core_config(settings, bundle, assembler.template).engine_args(on_cpu=False)
    assert (args["tensor_parallel_size"], args["data_parallel_size"]) == (4, 2)
    assert (args["gpu_memory_utilization"], args["kv_cache_memory_bytes"]) == (0.8, 1.5 * 2**30)
    assert args["enforce_eager"] and args["block_size"] is None
    assert Path(args["model"]).parent == tmp_path
    assert bundle.manifest.backbone.merged_id in args["model"]


def test_the_longest_prompt_that_the_template_allows_fits(bundle: Bundle, assembler: Assembler) -> None:
    template = assembler.template
    longest = Title((1,) * template.config.title_tokens)
    history = [longest] * 200
    history = history[template.first_kept(history) :]
    user = template.instruction(PromptKind.PROJECT) + template.user_segment(PromptKind.PROJECT, history)
    config = core_config(Settings(bundle=bundle.folder), bundle, template)
    assert len(user + template.candidate(PromptKind.PROJECT, longest)) < config.max_tokens


def test_merged_weights_are_saved_whole_and_once(bundle: Bundle, model: ScoringModel, tmp_path: Path) -> None:
    source = MergedSource(
        PackedSource((BundlePlace(bundle.folder, bundle.id),), "cpu", 1, 1024, 0), tmp_path / "deep" / "weights"
    )
    assert isinstance(source.open(), PackedModel)
    saved = {path.name: path.stat().st_mtime_ns for path in source.weights.iterdir()}
    assert "config.json" in saved and "model.safetensors" in saved
    assert [path.name for path in source.weights.parent.iterdir()] == ["weights"]
    source.open()
    assert {path.name: path.stat().st_mtime_ns for path in source.weights.iterdir()} == saved


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SELLA_VLLM_WEIGHTS", "~/merged")
    assert load_settings(bundle=Path("b")).vllm_weights == Path("/home/somebody/merged")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_server_says_what_to_install(bundle: Bundle, assembler: Assembler) -> None:
    settings = Settings(bundle=bundle.folder, engine="vllm")
    with pytest.raises(SettingsError, match=r"pip install 'sella\[vllm\]'"):
        open_engine(settings, bundle, assembler, structlog.get_logger(), lambda: None)
    done = CliRunner().invoke(app, ["run", "--bundle", str(bundle.folder), "--port", "0", "--engine", "vllm"])
    assert done.exit_code == 2
    assert done.stderr == "sella-serve: SELLA_ENGINE: vllm is not installed; pip install 'sella[vllm]'\n"


class Cache:
    """What `VllmCore.forget` asks of vLLM: it drops nothing while a block is in use, and says so."""

    def __init__(self, in_use: int) -> None:
        self.in_use, self.asked, self.dropped = in_use, 0, 0

    async def reset_prefix_cache(self) -> bool:
        self.asked += 1
        self.in_use -= 1
        self.dropped += self.in_use < 0
        return self.in_use < 0

    def shutdown(self, timeout: float) -> None: ...


@pytest.mark.anyio
async def test_the_prefix_cache_is_dropped_as_soon_as_no_block_is_in_use_and_new_prompts_wait(
    bundle: Bundle, assembler: Assembler
) -> None:
    core = VllmCore(core_config(Settings(bundle=bundle.folder), bundle, assembler.template), forward_limit_s=2)
    core._llm = cache = Cache(in_use=20)
    core.forget()
    core.forget()  # both are served by the first try that succeeds
    waited = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(core._admits.wait(), core._loop))
    await asyncio.sleep(0.05)
    assert not waited.done() and not cache.dropped
    await asyncio.wait_for(waited, 5)
    assert (cache.asked, cache.dropped) == (21, 1)

    core._llm = cache = Cache(in_use=10**6)  # a prompt that never ends holds up the others for a moment alone
    core.forget()
    await asyncio.sleep(0.05)
    waited = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(core._admits.wait(), core._loop))
    await asyncio.wait_for(waited, 5)
    assert not cache.dropped
    cache.in_use = 0
    await asyncio.sleep(0.2)
    assert cache.dropped == 1
    await core.close()


@pytest.mark.anyio
async def test_its_logits_are_compared_with_the_packed_models_before_a_bundle_is_served(
    bundle: Bundle, assembler: Assembler, projections: Projections, model: ScoringModel
) -> None:
    proof, supervision = open_parts(bundle).proof, Supervision(forward_limit_s=60, load_limit_s=60)
    source = PackedSource((BundlePlace(bundle.folder, bundle.id, proof),), "cpu", 1, 1024, 0)
    distiller = SupervisedEngine(source, supervision, structlog.get_logger())
    writer = PromptWriter(projections, torch.float32, "weights")
    config = core_config(Settings(bundle=bundle.folder), bundle, assembler.template)
    engine = VllmEngine(
        config, {bundle.id: writer}, lambda _: writer, distiller, [], supervision, structlog.get_logger()
    )
    await distiller.start()
    await distiller.ready()
    [logits_K] = model.logits([proof])

    class Core(VllmCore):
        def __init__(self, answers: np.ndarray) -> None:
            self.answers = answers

        async def ask(self, prompts: Sequence[MixedPrompt]) -> list[float]:
            assert len(prompts) == len(self.answers)
            return [float(one) for one in self.answers]

    await engine._prove(Core(logits_K), bundle.id, proof)
    for wrong in (logits_K + 1, logits_K[::-1], np.zeros_like(logits_K)):
        with pytest.raises(EngineBrokenError, match="the prompt that proves it: its logits"):
            await engine._prove(Core(wrong), bundle.id, proof)
    await distiller.close()


def test_an_answer_is_the_difference_of_log_probabilities(bundle: Bundle, assembler: Assembler) -> None:
    config = core_config(Settings(bundle=bundle.folder), bundle, assembler.template)
    core = VllmCore.__new__(VllmCore)  # no thread: an answer is read without vLLM
    core._config, core.sent_tokens, core.cached_tokens = config, 0, 0

    def answer(yes: float, no: float) -> SimpleNamespace:
        told = {config.answers.yes: SimpleNamespace(logprob=yes), config.answers.no: SimpleNamespace(logprob=no)}
        return SimpleNamespace(outputs=[SimpleNamespace(logprobs=[told])], prompt_token_ids=[1], num_cached_tokens=0)

    assert core._difference(answer(-1e-9, -30.0)) == pytest.approx(30)
    for wrong in (-np.inf, np.nan):
        with pytest.raises(JobFailedError, match="not finite"):
            core._difference(answer(-0.1, wrong))


@pytest.mark.anyio
@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize(
    ("error", "reason"), [("backbone is missing", "^backbone is missing$"), ("", "vLLM cannot start: No module named")]
)
async def test_what_cannot_load_is_told_once(
    bundle: Bundle, group: ScoringGroup, projections: Projections, assembler: Assembler, error: str, reason: str
) -> None:
    supervision = Supervision(forward_limit_s=2, load_limit_s=60)
    distiller = SupervisedEngine(ObedientSource(error=error), supervision, structlog.get_logger())
    config = core_config(Settings(bundle=bundle.folder), bundle, assembler.template)
    writer = PromptWriter(projections, torch.float32, "weights")
    engine = VllmEngine(
        config, {"": writer}, lambda _: writer, distiller, writer.write(group), supervision, structlog.get_logger()
    )
    with pytest.raises(EngineUnavailableError, match="starting"):
        await engine.score([])
    await engine.start()
    with pytest.raises(EngineBrokenError, match=reason):
        await engine.ready()
    assert engine.health().state is EngineState.BROKEN
    assert engine.health().restarts == 0
    await engine.close()
