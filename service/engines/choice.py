"""Which engine a bundle is served by, and what each is made of."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import structlog

from models.assembly import Assembler
from models.backbone import DTYPES
from models.features import ItemFeatures
from models.loading import Bundle
from models.packs import ScoringGroup
from models.probe import longest_prompt
from models.template import Template
from models.tokens import AnswerTokens
from service.engines.lifecycle import Supervision
from service.engines.merged import MergedSource
from service.engines.packed import WARM_UP_CANDIDATES, PackedSource
from service.engines.protocol import BundlePlace, Engine
from service.engines.supervised import SupervisedEngine
from service.engines.vllm import VllmEngine
from service.engines.vllm_config import CoreConfig
from service.engines.vllm_prompts import PromptWriter
from service.settings import Settings, SettingsError


def open_engine(
    settings: Settings,
    bundle: Bundle,
    assembler: Assembler,
    log: structlog.stdlib.BoundLogger,
    on_restart: Callable[[], None],
    gently: Callable[[], bool] = lambda: False,
    proof: ScoringGroup | None = None,
) -> Engine:
    """Return the engine that the settings name; it loads when it is told to start, and scores `proof` before it serves.

    Raises:
        SettingsError: it is not installed.
    """
    place = BundlePlace(bundle.folder.resolve(), bundle.id, proof)
    packed = PackedSource(
        places=(place,),
        device=settings.device,
        threads=settings.engine_threads,
        batch_tokens=settings.batch_tokens,
        cache_bytes=settings.cache_mb * 2**20,
        dtype=settings.dtype,
        compiled=settings.compiled,
    )
    supervision = Supervision(forward_limit_s=settings.forward_limit_s, load_limit_s=settings.load_limit_s)
    if settings.engine == "packed":
        return SupervisedEngine(packed, supervision, log, on_restart, gently)
    if find_spec("vllm") is None:
        raise SettingsError("SELLA_ENGINE: vllm is not installed; pip install 'sella[vllm]'")
    config = core_config(settings, bundle, assembler.template)
    distiller = SupervisedEngine(
        MergedSource(packed, config.weights), supervision, log.bind(engine="distiller"), on_restart, gently
    )
    writer = _writer(bundle)
    warm_up = writer.write(_warm_up_group(assembler, bundle.manifest.dimensions.d_model))
    return VllmEngine(
        config,
        {bundle.id: writer},
        _open_writer,
        distiller,
        warm_up,
        supervision,
        log.bind(engine="vllm"),
        on_restart,
        proofs=None if proof is None else {bundle.id: proof},
    )


def sharing_key(settings: Settings, bundle: Bundle, assembler: Assembler) -> tuple[str, int]:
    """Return what bundles must have in common to share one loaded model; the settings are the same for all."""
    # vLLM is started with a maximum length.
    longest = longest_prompt(assembler.template) if settings.engine == "vllm" else 0
    return bundle.manifest.backbone.merged_id, longest


def _open_writer(place: BundlePlace) -> PromptWriter:
    return _writer(Bundle.open_projections(place.folder, place.bundle_id))


def _writer(bundle: Bundle) -> PromptWriter:
    backbone = bundle.manifest.backbone
    return PromptWriter(bundle.projections(), DTYPES[backbone.dtype], backbone.merged_id)


def core_config(settings: Settings, bundle: Bundle, template: Template) -> CoreConfig:
    """Return what vLLM is started with. The weights' folder is named by what they are made of."""
    backbone = bundle.manifest.backbone
    return CoreConfig(
        weights=settings.vllm_weights.resolve() / f"{backbone.merged_id}-{backbone.dtype}",
        dtype=backbone.dtype,
        answers=AnswerTokens(backbone.yes_id, backbone.no_id),
        max_tokens=longest_prompt(template) + 1,
        tensor_parallel=settings.tensor_parallel,
        data_parallel=settings.data_parallel,
        gpu_memory=settings.vllm_gpu_memory,
        kv_gib=settings.vllm_kv_gib,
        eager=settings.vllm_eager,
    )


def _warm_up_group(assembler: Assembler, d_model: int) -> ScoringGroup:
    collab_C = assembler.prior.mean_C
    item = ItemFeatures(
        "warm-up", "A title to warm up with", collab_C, collab_C, np.ones(d_model, np.float32), trained=False
    )
    return assembler.group(assembler.user(None, [item], 1), [item] * WARM_UP_CANDIDATES)
