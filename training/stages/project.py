"""Stage 3: both projections and the tables learn to speak to the frozen language model (section 4.3, Eqs. 10-11).

Table 1: language model and LoRA frozen; collab vectors, semantic vectors and both projections trained. Eq. 11's sign
is a misprint: it is Eq. 5's cross-entropy on Fig. 4's prompt. The cold paths are part of the training: at random, a
target's user is folded in from its history and its item mapped from its text, so that the language model has seen both.

In the paper's form the language model's logit is the answer. With a small model or little data its AUC is lower than
that of the matrix factorisation whose vectors it reads. The default form starts from stage 2: the answer's logit is the
calibrated collaborative prediction plus the language model's logit times a weight that starts small. The vectors stay
as stage 2 left them, because the collaborative prediction is computed from them. Where no checkpoint is better on
valid, stage 2's prediction stays the answer.

Shapes: K targets of a forward, B rows, U users, I items, C = d_C, D = d_L.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from models.backbone import Backbone
from models.packs import Pack
from models.projection import Projections
from models.prompt_tree import SlotVectors, TreeModel, lay_out
from models.template import PromptKind
from training.examples import Examples, Int32, Targets, answer_loss, forwards, rows_in, rows_of, shuffled_steps
from training.loop import StageLoop, derived_seed
from training.prediction import figures, predict, worth
from training.run import Run
from training.stages.align import Collab
from training.stages.influence import Influence, influence

KIND = PromptKind.PROJECT
NEUTRAL = "."  # the text around whose embedding projected vectors start
LM_WEIGHT = 0.05  # of the language model's logit at the start, and the least
HEAD_RATE = 5.0  # learning rate of the head, relative to the projections'


class SlotTables(nn.Module):
    """The trainable vectors behind the slots, as deltas from stage 2, and their cold substitutes."""

    def __init__(self, collab: Collab) -> None:
        super().__init__()
        self.register_buffer("users_UC", collab.user_vectors_UC)
        self.register_buffer("items_IC", collab.item_vectors_IC)
        self.register_buffer("semantic_ID", collab.semantic_ID)
        self.register_buffer("cold_items_IC", torch.from_numpy(collab.text_map(collab.semantic_ID.numpy())))
        self.register_buffer("user_trained_U", collab.user_trained_U)
        self.register_buffer("item_trained_I", collab.item_trained_I)
        self.user_delta_UC = nn.Parameter(torch.zeros_like(collab.user_vectors_UC))
        self.item_delta_IC = nn.Parameter(torch.zeros_like(collab.item_vectors_IC))
        # Weight decay pulls the deltas to zero, so zero must be what stage 2 left.
        self.register_buffer("aligned_ID", collab.semantic_delta_ID)
        self.semantic_delta_ID = nn.Parameter(torch.zeros_like(collab.semantic_delta_ID))

    users_UC: Tensor
    items_IC: Tensor
    semantic_ID: Tensor
    aligned_ID: Tensor  # what stage 2 taught the trained items' semantic vectors
    cold_items_IC: Tensor
    user_trained_U: Tensor
    item_trained_I: Tensor

    def vectors(
        self,
        users_K: Tensor,
        items_K: Tensor,
        folded_KC: Tensor,
        cold_user_K: Tensor,
        cold_item_K: Tensor,
        own_label: Influence | None = None,
    ) -> SlotVectors:
        """Return the vectors of K targets; cold ones, by data or by choice, get their substitutes.

        `own_label` is what the targets' own labels did to their vectors, to be left out.
        """
        cold_user_K1 = (cold_user_K | ~self.user_trained_U[users_K])[:, None]
        cold_item_K1 = (cold_item_K | ~self.item_trained_I[items_K])[:, None]
        users = self.users_UC[users_K] + self.user_delta_UC[users_K]
        items = self.items_IC[items_K] + self.item_delta_IC[items_K]
        if own_label is not None:
            users, items = users - own_label.user_BC, items - own_label.item_BC
        users = torch.where(cold_user_K1, folded_KC, users)
        items = torch.where(cold_item_K1, self.cold_items_IC[items_K], items)
        learned = self.aligned_ID[items_K] + self.semantic_delta_ID[items_K]
        semantic = self.semantic_ID[items_K] + torch.where(cold_item_K1, 0.0, learned)
        return SlotVectors(users, items, semantic)

    @torch.no_grad()
    def final(self) -> dict[str, Tensor]:
        """Return the tables as they are served, cold rows filled with their substitutes."""
        trained_I1 = self.item_trained_I[:, None]
        return {
            "user_vectors": self.users_UC + self.user_delta_UC * self.user_trained_U[:, None],
            "item_vectors": torch.where(trained_I1, self.items_IC + self.item_delta_IC, self.cold_items_IC),
            "semantic": self.semantic_ID + (self.aligned_ID + self.semantic_delta_ID) * trained_I1,
        }


class Head(nn.Module):
    """How the language model's logit becomes the stage's answer.

    The logit's weight is always positive: the projections must learn a logit that helps, not one to subtract, because
    the fusion of `score` takes no negative weight.
    """

    def __init__(self, slope: float, intercept: float, lm_weight: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.intercept = nn.Parameter(torch.tensor(intercept))
        self.lm_weight = nn.Parameter(torch.tensor(lm_weight))

    def forward(self, lm_K: Tensor, collab_K: Tensor) -> Tensor:
        """Return the answers' logits, `(K,)`."""
        # The value is clamped and the gradient is not: below the least the weight could otherwise never grow again.
        lm_weight = self.lm_weight + (self.lm_weight.clamp(min=LM_WEIGHT) - self.lm_weight).detach()
        logits_K: Tensor = self.slope * collab_K + self.intercept + lm_weight * lm_K
        return logits_K

    def keep_positive(self) -> None:
        """Put the weight back to the least if a step took it below; every process does so, with or without forwards."""
        self.lm_weight.data.clamp_(min=LM_WEIGHT)


def initial_head(run: Run, collab: Collab, train: Targets, own_label: Influence) -> Head:
    """Return the initial head: stage 2 calibrated on train, each row without its own label.

    In the paper's form the head returns the language model's logit, and has nothing to train.
    """
    if run.config.project.form == "paper":
        return Head(0.0, 0.0, 1.0).requires_grad_(False)
    base = float(np.average(train.label_B, weights=train.weight_B).clip(1 / (len(train) + 2), 1 - 1 / (len(train) + 2)))
    users_BC = collab.user_vectors_UC[torch.from_numpy(train.user_B).long()] - own_label.user_BC
    items_BC = collab.item_vectors_IC[torch.from_numpy(train.item_B).long()] - own_label.item_BC
    predicted_B1 = (users_BC * items_BC).sum(-1, keepdim=True).double().numpy()
    # Matrix factorisation predicts the label itself, so this is its slope in log-odds if it is right. Where it knows
    # little, leaving own labels out turns the fitted slope down, even below zero.
    expected = 1 / (base * (1 - base))
    slope = expected
    if 0 < train.label_B.mean() < 1:
        slope = LogisticRegression(C=1e6).fit(predicted_B1, train.label_B > 0, train.weight_B).coef_[0, 0]
    slope = float(np.clip(slope, expected / 10, expected * 2))
    mean = float(np.average(predicted_B1[:, 0], weights=train.weight_B))
    return Head(slope, float(np.log(base / (1 - base))) - slope * mean, LM_WEIGHT)


@dataclass(frozen=True)
class Projected:
    """What stage 3 leaves: the tables, the projections, and its validation logits."""

    tables: dict[str, Tensor]
    projections: Projections
    valid_logits_B: np.ndarray  # of the rows that choose checkpoints; 0 elsewhere
    evaluations: list[dict[str, float | None]]


def initial_projections(run: Run, backbone: Backbone, collab: Collab, *, fresh_collab: bool = False) -> Projections:
    """Return the projections stage 3 starts from: stage 2's for collab (or a fresh one), a random one for warm.

    The projected vectors start around the embedding of a full stop, `slot_scale` mean token embeddings away from it.
    So the prompt reads at first as text whose slots hold nothing, and the language model's answer is what stage 1 has
    taught it. Random vectors in the slots took its AUC back to chance (docs/results.md).
    """
    torch.manual_seed(derived_seed(run.config.seed, "projections"))
    config = run.config.align
    projections = Projections(config.d_collab, config.d_hidden, backbone.d_model)
    if not fresh_collab:
        projections.collab.load_state_dict(collab.projection.state_dict())
    users = collab.user_vectors_UC[collab.user_trained_U]
    items = collab.item_vectors_IC[collab.item_trained_I]
    projections.collab.standardize(users, items)
    distance = run.config.project.slot_scale * backbone.embedding_norm()
    neutral_D = backbone.embedding_of(NEUTRAL).cpu()
    projections.collab.start_at(torch.cat([users, items]), neutral_D, distance)
    projections.warm.start_at(collab.semantic_ID, neutral_D, distance)
    return projections


@dataclass(frozen=True)
class SlotForward:
    """Stage 3's forward: packed prompts of Fig. 4 with the tables' vectors in their slots."""

    run: Run
    model: TreeModel
    projections: Projections
    tables: SlotTables
    head: Head
    folded: dict[str, Tensor]  # split -> each row's user as if never trained, (B, C)

    def __call__(
        self,
        targets: Targets,
        batch: Sequence[tuple[Pack, Int32]],
        cold_B2: Tensor | None = None,
        own_label: Influence | None = None,
    ) -> Tensor:
        """Return the logits of a batch, `(K,)`.

        In training `cold_B2` says whose user and item vectors are replaced, and `own_label` what is left out of them.
        """
        rows, device = rows_of(batch), self.run.device
        cold_K2 = torch.zeros(len(rows), 2, dtype=torch.bool) if cold_B2 is None else cold_B2[rows]
        cold_user_K, cold_item_K = cold_K2.to(device).unbind(-1)
        vectors = self.tables.vectors(
            torch.from_numpy(targets.user_B[rows]).long().to(device),
            torch.from_numpy(targets.item_B[rows]).long().to(device),
            self.folded[targets.split][rows].to(device),
            cold_user_K,
            cold_item_K,
            None if own_label is None else own_label.of(rows, device),
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.run.config.autocast):
            tree = lay_out([pack for pack, _ in batch]).to(device)
            lm_K = self.model.logits(tree, self.projections, vectors)
        logits_K: Tensor = self.head(lm_K, (vectors.user_UC * vectors.item_KC).sum(-1))
        return logits_K

    def predict(self, examples: Examples, targets: Targets) -> np.ndarray:
        """Return the logits of a split's targets, `(B,)`."""
        return predict(self.run, examples, KIND, targets, lambda batch: self(targets, batch))


def project(run: Run, examples: Examples, backbone: Backbone, collab: Collab, projections: Projections) -> Projected:
    """Train projections and tables on Fig. 4's prompt."""
    config = run.config.project
    train = examples.targets("train", run.config.max_targets)
    valid = examples.targets("valid", run.config.max_targets)
    judged = valid.limited(run.config.validation_rows)
    folded = {targets.split: folded_users(examples, targets, collab) for targets in (train, valid)}
    own_label = influence(collab.user_vectors_UC, collab.item_vectors_IC, train, run.config.align)
    tables = SlotTables(collab).to(run.device)
    head = initial_head(run, collab, train, own_label).to(run.device)
    forward = SlotForward(run, TreeModel(backbone), projections.to(run.device), tables, head, folded)

    def evaluate() -> dict[str, float | None]:
        return figures(forward.predict(examples, judged), judged)

    def plan(rng: np.random.Generator) -> list[tuple[list[Int32], Tensor]]:
        steps = shuffled_steps(train, config.schedule.batch_targets, rng)
        share = torch.tensor([config.cold_users, config.cold_items])
        cold_B2 = torch.from_numpy(rng.random((len(train), 2), dtype=np.float32)) < share
        return [(groups, cold_B2) for groups in steps]

    loop = StageLoop(
        run,
        "project",
        _rates(tables, projections, head, run),
        config.schedule,
        plan,
        evaluate,
        rows=lambda step: rows_in(step[0]),
    )
    if not loop.restore():
        for groups, cold_B2 in loop.steps():
            head.keep_positive()
            total = float(train.weight_B[np.concatenate(groups)].sum())
            packs = [(examples.pack(KIND, train, rows), rows) for rows in groups]
            for batch in run.share(list(forwards(packs, run.config.max_tokens))):
                loss = answer_loss(forward(train, batch, cold_B2, own_label), train, rows_of(batch))
                loop.backward(loss / total)
    loop.keep_best()
    logits_B = forward.predict(examples, judged)
    if config.form == "correction":
        stage_2_B = collab_predictions(examples, collab, valid)
        if worth(figures(stage_2_B, judged)) > worth(figures(logits_B, judged)):
            run.say("project: no checkpoint is better than stage 2 on valid, whose prediction stays")
            logits_B = stage_2_B
    final = {name: tensor.cpu() for name, tensor in tables.final().items()}
    return Projected(final, projections.cpu(), logits_B, loop.evaluations)


def collab_predictions(examples: Examples, collab: Collab, targets: Targets) -> np.ndarray:
    """Return stage 2's predictions, `(B,)`, with the vectors that are served: new users are folded in."""
    users_BC = collab.user_vectors_UC[torch.from_numpy(targets.user_B).long()].numpy()
    new_B1 = ~collab.user_trained_U.numpy()[targets.user_B][:, None]
    users_BC = np.where(new_B1, folded_users(examples, targets, collab).numpy(), users_BC)
    predicted_B: np.ndarray = (users_BC * collab.item_vectors_IC.numpy()[targets.item_B]).sum(-1).astype(np.float64)
    return predicted_B


def folded_users(examples: Examples, targets: Targets, collab: Collab) -> Tensor:
    """Return every target's user as if never trained, folded in from its window, `(B, C)`."""
    items_IC = collab.item_vectors_IC.numpy()
    folded = np.empty((len(targets), items_IC.shape[1]), np.float32)
    for row in range(len(targets)):
        folded[row] = collab.prior.fold_in(items_IC[examples.window(targets, row)])
    return torch.from_numpy(folded)


def _rates(
    tables: SlotTables, projections: Projections, head: Head, run: Run
) -> list[tuple[dict[str, nn.Parameter], float, float]]:
    config = run.config.project
    decay = config.schedule.weight_decay
    rates = [({f"projections.{name}": one for name, one in projections.named_parameters()}, 1.0, decay)]
    if config.form == "paper":
        named = {f"tables.{name}": one for name, one in tables.named_parameters()}
        return [*rates, (named, config.table_rate, config.table_decay)]
    tables.requires_grad_(False)
    # Three numbers. The weight starts small, and until it grows little gradient reaches the projections.
    return [*rates, ({f"head.{name}": one for name, one in head.named_parameters()}, HEAD_RATE, 0.0)]
