"""A bundle and its prompts in words: what `sella-train inspect` and `sella-train prompt` print."""

from collections.abc import Sequence
from typing import Any

import torch

from models.assembly import known_pairs
from models.bundle import Manifest
from models.features import ItemFeatures
from models.fusion import probabilities
from models.ids import IdError, canonical_id
from models.loading import Bundle
from models.segments import SlotKind
from models.titles import clean_title
from training.evaluate import Scorer


def describe_prompt(
    bundle: Bundle,
    scorer: Scorer,
    user_id: str,
    item_id: str,
    history: Sequence[str] | None,
    title: str | None,
    *,
    with_vectors: bool = False,
) -> dict[str, Any]:
    """Return one pair's prompt as a dictionary: ids, text, slots, answer ids, what was cut, and the score.

    Raises:
        IdError: an item that is not in the catalogue and came without a title.
        TitleError: an item that is not in the catalogue came with text that is no title.
    """
    if history is None:
        assembled = scorer.stored_user(canonical_id(user_id))
    else:
        user = scorer.tables.user(canonical_id(user_id))
        given = scorer.user(user, [canonical_id(one) for one in history], len(history))
        assembled = scorer.updated(canonical_id(user_id), given)
    item = _item(scorer, canonical_id(item_id), title)
    group = scorer.assembler.group(assembled, [item])
    prompt = group.pack.trunk + group.pack.branches[0].segment
    logits = scorer.model.logits([group])[0]
    counts = scorer.user_counts(canonical_id(user_id))
    fusion = bundle.fusion()
    known = known_pairs(logits, group, (counts, assembled), [(item.counts, not item.trained)], live=True)
    described: dict[str, Any] = {
        "bundle_id": bundle.id,
        "user_id": user_id,
        "item_id": item_id,
        "token_ids": list(prompt.token_ids),
        "text": _text(scorer, prompt.token_ids, {index: kind for kind, index in prompt.slots}),
        "slots": [{"kind": str(kind), "index": index} for kind, index in prompt.slots],
        "user_segment_tokens": len(group.pack.trunk),
        "yes_id": bundle.manifest.backbone.yes_id,
        "no_id": bundle.manifest.backbone.no_id,
        "cold_user": assembled.cold,
        "cold_item": not item.trained,
        "history": {
            "given": assembled.history.given,
            "used": assembled.history.used,
            "dropped": assembled.history.dropped,
        },
        "titles_cut": assembled.titles_cut + (scorer.assembler.title(item.title).cut > 0),
        "raw_score": float(probabilities(logits)[0]),
        "score": float(fusion(known)[0]),
        "parts": {name: float(part[0]) for name, part in fusion.parts(known).items()},
    }
    if with_vectors:
        described["slot_vectors"] = _projected(scorer, group.user_1C[0], item)
    return described


def prompt_text(described: dict[str, Any]) -> str:
    """Return a described prompt for reading."""
    slots = ", ".join(f"{slot['kind']} at {slot['index']}" for slot in described["slots"])
    history = described["history"]
    return "\n".join(
        [
            f"token ids ({len(described['token_ids'])}): {' '.join(map(str, described['token_ids']))}",
            f"slots: {slots}",
            f"user segment: the first {described['user_segment_tokens']} tokens",
            f"history: {history['given']} given, {history['used']} used, {history['dropped']} dropped",
            f"cold: user {described['cold_user']}, item {described['cold_item']}",
            f"Yes = {described['yes_id']}, No = {described['no_id']}",
            f"raw_score {described['raw_score']:.6f}, score {described['score']:.6f}",
            "parts of the score's logit: "
            + ", ".join(f"{name} {part:+.4f}" for name, part in described["parts"].items()),
            "text:",
            described["text"],
        ]
    )


def bundle_text(manifest: Manifest) -> str:
    """Return a verified manifest for reading."""
    sizes, lm = manifest.dimensions, manifest.backbone
    source = f"{lm.source} at {lm.revision}" if lm.revision else lm.source
    lines = [
        f"bundle {manifest.bundle_id}",
        f"format {manifest.format_version}, written by {manifest.created_by}; every file verified",
        f"backbone {source} as {lm.dtype}; Yes = {lm.yes_id}, No = {lm.no_id}",
        f"merged weights {lm.merged_id}",
        f"{sizes.users:,} users, {sizes.items:,} items; d_C {sizes.d_collab}, d_L {sizes.d_model}",
        f"template: {manifest.template.model_dump_json()}",
        f"data {manifest.data_fingerprint}, seed {manifest.seed}",
    ]
    overall = manifest.metrics.get("all", {})
    for metric in ("auc", "uauc", "log_loss", "ece"):
        found = overall.get(metric)
        if found and found["value"] is not None:
            lines.append(f"valid {metric} {found['value']:.4f} ({found['low']:.4f} to {found['high']:.4f})")
    lines.append("files:")
    lines += [f"  {entry.size:>12,} {entry.sha256[:16]} {name}" for name, entry in sorted(manifest.files.items())]
    return "\n".join(lines)


def _item(scorer: Scorer, item_id: str, title: str | None) -> ItemFeatures:
    item = scorer.tables.item(item_id)
    if item is None and title is None:
        raise IdError(f"item {item_id!r} is not in the bundle's catalogue; give its title with --title")
    return item or scorer.item(item_id, clean_title(title or ""))


def _text(scorer: Scorer, token_ids: Sequence[int], slots: dict[int, SlotKind]) -> str:
    """Decode the ids between the slots; a slot shows as its name."""
    pieces: list[str] = []
    start = 0
    tokenizer = scorer.model.backbone.tokenizer
    for index in [*sorted(slots), len(token_ids)]:
        pieces.append(str(tokenizer.decode(list(token_ids[start:index]))))
        if index in slots:
            pieces.append(str(slots[index]))
        start = index + 1
    return "".join(pieces)


@torch.no_grad()
def _projected(scorer: Scorer, user_C: Any, item: ItemFeatures) -> dict[str, list[float]]:
    projections, device = scorer.model.projections, scorer.model.backbone.device
    raw = {SlotKind.USER: user_C, SlotKind.ITEM: item.collab_C, SlotKind.WARM: item.semantic_D}
    projected = {}
    for kind, vector in raw.items():
        project = projections.warm if kind is SlotKind.WARM else projections.collab
        projected[str(kind)] = project(torch.from_numpy(vector)[None].to(device))[0].float().cpu().tolist()
    return projected
