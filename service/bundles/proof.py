"""What a bundle has to prove before it serves: its files' contents, and a prompt of its own that is scored to the end.

Every bundle goes through this, whether the service starts with it or changes to it. The engine scores the prompt that
is made here before it serves the bundle, and compares the logits with the reference's.
"""

import numpy as np

from models.assembly import AssembledUser, Assembler, known_pairs
from models.bundle import MANIFEST, BundleError
from models.features import NO_COUNTS, HistoryItem, ItemFeatures, Tables
from models.fusion import Fusion
from models.loading import FUSION, Bundle
from models.packs import ScoringGroup
from service.metrics.drift import references_of

CANDIDATES = 20  # of a proof: unlike ones, spread over the catalogue
HISTORY = 3  # items that a user without training is folded in from


def prove_contents(bundle: Bundle, tables: Tables, assembler: Assembler, fusion: Fusion) -> ScoringGroup:
    """Assemble prompts of a trained and of an untrained user and fuse logits of zero; return one for the engine.

    Raises:
        BundleError: names the file that cannot be served.
    """
    bundle.projections()
    try:
        references_of(bundle.manifest.reference)
    except Exception as error:  # whatever a list of the wrong shape or type makes of it
        raise BundleError(f"{bundle.folder / MANIFEST}: 'reference' holds no distributions: {_line(error)}") from error
    try:
        with np.errstate(all="ignore"):
            items = _candidates(tables)
            users = [_user(tables, assembler, row) for row in _chosen_users(tables)]
            users.append(assembler.user(None, items[:HISTORY], len(items[:HISTORY])))
            groups = [assembler.group(user, items) for user in users]
            finite = [_fused(fusion, group, user, items) for group, user in zip(groups, users, strict=True)]
    except Exception as error:  # whatever numpy makes of numbers that are finite and do not go together
        raise BundleError(f"{bundle.folder}: its users and items make no prompt: {_line(error)}") from error
    if not all(finite):
        raise BundleError(f"{bundle.folder / FUSION}: a score that is not finite comes of its weights")
    return groups[0]


def _candidates(tables: Tables) -> list[ItemFeatures]:
    """Return items spread over the catalogue; one from outside if it is empty."""
    last = len(tables.item_ids) - 1
    rows = np.unique(np.linspace(0, last, CANDIDATES).astype(int)).tolist() if last >= 0 else []
    found = [item for row in rows if (item := tables.item(tables.item_ids[row])) is not None]
    outside = np.zeros(tables.semantic_ID.shape[1], np.float32)
    return found or [tables.unseen_item("outside", "A title from outside", outside)]


def _chosen_users(tables: Tables) -> list[int]:
    """Return the row of a trained user with a history, if there is one."""
    trained = np.flatnonzero(tables.user_trained_U)[:1].tolist()
    return next(([row] for row in np.flatnonzero(tables.user_trained_U).tolist() if tables.histories[row]), trained)


def _user(tables: Tables, assembler: Assembler, row: int) -> AssembledUser:
    """Return a user with the end of the stored history, the vector updated with the stored outcomes."""
    user_id = tables.user_ids[row]
    known = tables.user(user_id)
    shown = assembler.template.config.max_history
    stored = tables.histories[row][-shown:] if shown else ()
    window: list[HistoryItem] = [item for one in stored if (item := tables.item(one)) is not None]
    user = assembler.user(known, window, len(window))
    return assembler.updated(user, tables.evidence(user_id, tables.stored_outcomes(user_id)), np.inf)


def _fused(fusion: Fusion, group: ScoringGroup, user: AssembledUser, items: list[ItemFeatures]) -> bool:
    """Return whether scores with static and with live counts are finite."""
    lm_K = np.zeros(len(items))
    told = [(item.counts, not item.trained) for item in items]
    both = (known_pairs(lm_K, group, (NO_COUNTS, user), told, live=live) for live in (False, True))
    return all(bool(np.isfinite(fusion.logits(known)).all()) for known in both)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
