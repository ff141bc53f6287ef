"""Interactions as packed prompts: targets that share a history share one pass over it.

Shapes: B rows of a split, K targets of some packs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.packs import Branch, Pack
from models.segments import Segment
from models.template import PromptKind, Template, Title, window_start
from training.data.dataset import Dataset
from training.data.history import Histories

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Targets:
    """The packed rows of one split: rows of a user whose windows start at the same item stand together."""

    split: str
    user_B: Int32  # code of the user in the histories
    item_B: Int32  # row of the item
    label_B: NDArray[np.float32]
    weight_B: NDArray[np.float32]
    first_B: Int32  # index of the window's first item among the user's positives
    end_B: Int32  # one past its last: the row's number of earlier positives
    groups: list[Int32]  # rows that share a window start, in order

    def __len__(self) -> int:
        return len(self.user_B)

    def limited(self, rows: int) -> "Targets":
        """Return the same targets with whole groups, spread evenly, of about `rows` rows in all."""
        if len(self) <= rows:
            return self
        kept = np.linspace(0, len(self.groups) - 1, max(1, len(self.groups) * rows // len(self)))
        return replace(self, groups=[self.groups[index] for index in np.unique(kept.astype(int))])

    def only(self, kept_B: NDArray[np.bool_]) -> "Targets":
        """Return the same targets without the rows that are not kept."""
        groups = (rows[kept_B[rows]] for rows in self.groups)
        return replace(self, groups=[rows for rows in groups if len(rows)])


class Examples:
    """Renders a dataset's rows as packs."""

    def __init__(self, dataset: Dataset, histories: Histories, template: Template) -> None:
        self.dataset = dataset
        self.histories = histories
        self.template = template
        self.titles: list[Title] = template.titles(dataset.items["title"].to_list())
        self._lines = [template.history_item(title) for title in self.titles]

    def targets(self, split: str, max_targets: int) -> Targets:
        """Return a split's rows, grouped for packing, at most `max_targets` in a group."""
        frame, rows = self.dataset.splits[split], self.histories.of_split(split)
        first = np.fromiter(
            (self._first(int(user), int(end)) for user, end in zip(rows.user_code, rows.length, strict=True)),
            np.int32,
            len(rows.length),
        )
        return Targets(
            split=split,
            user_B=rows.user_code,
            item_B=rows.item_row,
            label_B=frame["label"].to_numpy().astype(np.float32),
            weight_B=frame["weight"].to_numpy().copy(),  # polars hands out its own memory, read-only
            first_B=first,
            end_B=rows.length,
            groups=list(_groups(rows.user_code, first, rows.length, max_targets)),
        )

    def window(self, targets: Targets, row: int) -> Int32:
        """Return the item rows of a target's window, oldest first."""
        return self.histories.positives_of(int(targets.user_B[row]))[targets.first_B[row] : targets.end_B[row]]

    def pack(self, kind: PromptKind, targets: Targets, rows: Int32) -> Pack:
        """Render rows that share a window start: the trunk holds the longest history, each attaches at its own."""
        start, end = int(targets.first_B[rows[0]]), int(targets.end_B[rows].max())
        trunk_ids = list(self.template.instruction(kind).token_ids)
        attach = {start: len(trunk_ids)}
        for index, item in enumerate(self.histories.positives_of(int(targets.user_B[rows[0]]))[start:end], start):
            trunk_ids.extend(self._lines[item].token_ids)
            attach[index + 1] = len(trunk_ids)
        branches = tuple(
            Branch(
                attach[int(targets.end_B[row])],
                self.template.user_tail(kind, empty_history=int(targets.end_B[row]) == start)
                + self.template.candidate(kind, self.titles[targets.item_B[row]]),
            )
            for row in rows
        )
        return Pack(Segment(tuple(trunk_ids)), branches)

    def title_pack(self, items: Int32) -> Pack:
        """Render items with an empty history and no slots; this prompt is the same for every user."""
        kind = PromptKind.ADAPT
        trunk = self.template.instruction(kind) + self.template.user_tail(kind, empty_history=True)
        branches = (Branch(len(trunk), self.template.candidate(kind, self.titles[item])) for item in items)
        return Pack(trunk, tuple(branches))

    def _first(self, user: int, end: int) -> int:
        start = window_start(end, self.template.config)
        window = self.histories.positives_of(user)[start:end]
        return start + self.template.first_kept([self.titles[item] for item in window])


def _groups(user_B: Int32, first_B: Int32, end_B: Int32, max_targets: int) -> Iterator[Int32]:
    """Yield runs of rows with the same user and window start, in the order the history grows."""
    order = np.lexsort((end_B, first_B, user_B))
    changes = (np.diff(user_B[order]) != 0) | (np.diff(first_B[order]) != 0)
    for run in np.split(order, np.flatnonzero(changes) + 1):
        for start in range(0, len(run), max_targets):
            yield run[start : start + max_targets].astype(np.int32)


def answer_loss(logits_K: Tensor, targets: Targets, rows_K: Int32) -> Tensor:
    """Return the weighted cross-entropy of the answers, summed over a forward's targets (Eq. 5; Eq. 11 sign corrected).

    The softmax of two logits is the sigmoid of their difference.
    """
    labels_K, weights_K = torch.from_numpy(targets.label_B[rows_K]), torch.from_numpy(targets.weight_B[rows_K])
    return nn.functional.binary_cross_entropy_with_logits(
        logits_K, labels_K.to(logits_K.device), weights_K.to(logits_K.device), reduction="sum"
    )


class RowsByItem:
    """The rows of a split by item. Without a history all rows of an item have the same prompt and the same logit."""

    def __init__(self, targets: Targets) -> None:
        self._order = np.argsort(targets.item_B, kind="stable").astype(np.int32)
        counted_I = np.bincount(targets.item_B)
        self._first_I = np.concatenate([[0], np.cumsum(counted_I)])
        self.items: Int32 = np.flatnonzero(counted_I).astype(np.int32)  # items with rows

    def of(self, items: Int32) -> tuple[Int32, Int32]:
        """Return the rows of the items, `(N,)`, and for each row the index of its item in `items`, `(N,)`."""
        rows = [self._order[self._first_I[item] : self._first_I[item + 1]] for item in items]
        return np.concatenate(rows), np.repeat(np.arange(len(items), dtype=np.int32), [*map(len, rows)])

    def dealt(self, steps: int, size: int, rng: np.random.Generator) -> list[Int32]:
        """Return `size` distinct items for every step, or all items if there are fewer.

        Each pass over the items shuffles them and leaves out the last ones if they do not fill a step.
        """
        size = min(size, len(self.items))
        chosen: list[Int32] = []
        while len(chosen) < steps:
            shuffled = rng.permutation(self.items)
            chosen += [shuffled[start : start + size] for start in range(0, len(shuffled) - size + 1, max(1, size))]
        return chosen[:steps]


def shuffled_steps(targets: Targets, batch_targets: int, rng: np.random.Generator) -> list[list[Int32]]:
    """Shuffle the groups and deal them into steps of about `batch_targets` targets; the last may be smaller."""
    steps: list[list[Int32]] = []
    filled = batch_targets
    for index in rng.permutation(len(targets.groups)):
        if filled >= batch_targets:
            steps.append([])
            filled = 0
        steps[-1].append(targets.groups[index])
        filled += len(targets.groups[index])
    return steps


def forwards(packs: Iterable[tuple[Pack, Int32]], max_tokens: int) -> Iterator[list[tuple[Pack, Int32]]]:
    """Fill forwards with packs in order: at most `max_tokens` tokens in each, but at least one pack."""
    batch: list[tuple[Pack, Int32]] = []
    tokens = 0
    for pack, rows in packs:
        if batch and tokens + pack.tokens > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append((pack, rows))
        tokens += pack.tokens
    if batch:
        yield batch


def rows_in(step: list[Int32]) -> int:
    """Return the number of targets in the groups of a step."""
    return sum(map(len, step))


def rows_of(batch: Sequence[tuple[Pack, Int32]]) -> Int32:
    """Return the rows of a batch in the order of its answers, (K,)."""
    return np.concatenate([rows for _, rows in batch])
