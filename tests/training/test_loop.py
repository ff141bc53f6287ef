from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from training.config import ScheduleConfig
from training.loop import StageLoop, TrainingError, derived_seed
from training.run import Run

Runs = Callable[..., Run]


class Toy:
    """A stage in miniature: a noisy quadratic; `figures` are what its evaluations say, else its own closeness."""

    def __init__(
        self, run: Run, figures: list[float] | None = None, length: int | None = None, **schedule: Any
    ) -> None:
        self.weight = nn.Parameter(torch.zeros(3))
        self.bias = nn.Parameter(torch.ones(()))
        self.length = length
        self.figures: Iterator[float] | None = iter(figures) if figures else None
        rates: list[tuple[dict[str, nn.Parameter], float, float]] = [
            ({"weight": self.weight}, 1.0, 0.01),
            ({"bias": self.bias}, 0.5, 0.0),
        ]
        chosen = ScheduleConfig.model_validate({"epochs": 3, "learning_rate": 0.1, "patience": 99, **schedule})
        self.loop = StageLoop[Tensor](run, "toy", rates, chosen, self.plan, self.evaluate)

    def plan(self, rng: np.random.Generator) -> list[Tensor]:
        """An epoch's length differs from the next one's, as it does where groups are dealt into steps."""
        steps = self.length or 4 + int(rng.integers(4))
        return [torch.from_numpy(rng.normal(1.0, 0.5, 3)).float() for _ in range(steps)]

    def evaluate(self) -> dict[str, float]:
        close = -float((self.weight.detach() - 1).square().sum() + self.bias.detach().square())
        return {"auc": close if self.figures is None else next(self.figures)}

    def loss(self, target_3: Tensor) -> Tensor:
        noise_3 = torch.randn(3) * 0.3  # from the global state, as dropout's
        return (self.weight + self.bias + noise_3 - target_3).square().sum()

    def train(self, before: Callable[[int], None] = lambda step: None) -> None:
        if not self.loop.restore():
            for target_3 in self.loop.steps():
                before(self.loop.step)
                self.loop.backward(self.loss(target_3))

    def state(self) -> dict[str, Any]:
        """Everything the stage is: parameters, best ones, optimizer, evaluations."""
        return {
            "now": {name: one.detach().clone() for name, one in self.loop.parameters.items()},
            "best": dict(self.loop.best),
            "optimizer": {name: dict(self.loop.optimizer.state[one]) for name, one in self.loop.parameters.items()},
            "evaluations": self.loop.evaluations,
            "step": self.loop.step,
        }


class KilledError(Exception):
    pass


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 18), st.integers(0, 6)), min_size=1, max_size=3), st.sampled_from([1, 2, 3]))
def test_a_resumed_stage_is_bit_equal_whenever_it_was_saved_and_killed(
    new_run: Runs, tmp_path_factory: pytest.TempPathFactory, kills: list[tuple[int, int]], per_epoch: int
) -> None:
    folder = tmp_path_factory.mktemp("loop")
    whole = Toy(new_run(folder / "whole"), evaluations_per_epoch=per_epoch)
    whole.train()
    run = new_run(folder / "killed", checkpoint_seconds=1e9)
    for saved, later in kills:
        victim = Toy(run, evaluations_per_epoch=per_epoch)

        def kill(step: int, victim: Toy = victim, saved: int = saved, later: int = later) -> None:
            if step == saved:
                victim.loop.save()
            if step == saved + later:
                raise KilledError

        torch.manual_seed(saved)  # a new process has another random state
        with suppress(KilledError):
            victim.train(kill)
    resumed = Toy(run, evaluations_per_epoch=per_epoch)
    torch.manual_seed(12345)
    resumed.train()
    torch.testing.assert_close(resumed.state(), whole.state(), rtol=0, atol=0)


def test_checkpoints_are_written_as_time_passes(new_run: Runs, tmp_path: Path) -> None:
    steps: list[int] = []

    def kill(step: int) -> None:
        steps.append(step)
        if step == 5:
            raise KilledError

    run = new_run(tmp_path, checkpoint_seconds=1e-9)
    with pytest.raises(KilledError):
        Toy(run).train(kill)
    resumed = Toy(run)
    assert not resumed.loop.restore()
    assert resumed.loop.step == steps[-1] == 5


def test_a_finished_stage_takes_no_more_steps(new_run: Runs, tmp_path: Path) -> None:
    run = new_run(tmp_path)
    first = Toy(run)
    first.train()
    again = Toy(run)

    def refuse(step: int) -> None:
        raise AssertionError("a finished stage took a step")

    again.train(refuse)
    again.loop.keep_best()
    for name, parameter in again.loop.parameters.items():
        assert torch.equal(parameter.detach(), first.loop.best[name])


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_stage_by_name_and_leaves_the_checkpoint(
    new_run: Runs, tmp_path: Path, poison: str
) -> None:
    run = new_run(tmp_path, checkpoint_seconds=1e-9)
    toy = Toy(run)
    before: dict[int, bytes] = {}
    with pytest.raises(TrainingError, match=r"toy, step 4: .*not finite"):
        for target_3 in toy.loop.steps():
            if toy.loop.step == 4:
                before[4] = (tmp_path / "toy.safetensors").read_bytes()
                bad = toy.weight.sum() * torch.nan if poison == "loss" else (toy.weight * 0 + 0).sqrt().sum()
                toy.loop.backward(bad)
            else:
                toy.loop.backward(toy.loss(target_3))
    assert (tmp_path / "toy.safetensors").read_bytes() == before[4]
    assert toy.weight.isfinite().all() and toy.bias.isfinite()
    resumed = Toy(run)
    resumed.train()  # the poison gone, the run goes on from there
    assert resumed.loop.step >= 12


def test_the_best_parameters_are_kept_and_not_the_last(new_run: Runs, tmp_path: Path) -> None:
    toy = Toy(new_run(tmp_path), figures=[0.5, 0.6, 0.9, 0.7, 0.9, *[0.1] * 99], evaluations_per_epoch=99)
    at_step: dict[int, Tensor] = {}

    def watch(step: int) -> None:
        at_step[step] = toy.weight.detach().clone()

    toy.train(watch)
    assert not torch.equal(toy.weight.detach(), at_step[2])
    toy.loop.keep_best()
    # The third evaluation follows the second step; a tie later does not replace it.
    assert torch.equal(toy.weight.detach(), at_step[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("evaluation", [0, 3])
def test_weights_whose_scores_are_not_finite_are_no_best_but_stop_the_stage(
    new_run: Runs, tmp_path: Path, bad: float, evaluation: int
) -> None:
    """The last step's weights are judged before a next loss could show it."""
    toy = Toy(new_run(tmp_path), length=3, figures=[*[0.5] * evaluation, bad], epochs=1, evaluations_per_epoch=99)
    with pytest.raises(TrainingError, match=rf"toy, step {evaluation}: the scores of valid are not finite"):
        toy.train()
    assert len(toy.loop.evaluations) == evaluation


def test_without_an_auc_the_log_loss_chooses(new_run: Runs, tmp_path: Path) -> None:
    toy = Toy(new_run(tmp_path), length=4, epochs=1, evaluations_per_epoch=99)
    losses = iter([0.9, 0.5, 0.4, 0.6, 0.7])
    toy.loop._evaluate = lambda: {"auc": None, "log_loss": next(losses)}
    at_step: dict[int, Tensor] = {}
    toy.train(lambda step: at_step.update({step: toy.weight.detach().clone()}))
    assert toy.loop.best["weight"].equal(at_step[2])


def test_the_start_may_be_the_best(new_run: Runs, tmp_path: Path) -> None:
    toy = Toy(new_run(tmp_path), figures=[0.9, *[0.1] * 99])
    toy.train()
    toy.loop.keep_best()
    assert torch.equal(toy.weight.detach(), torch.zeros(3))


@pytest.mark.parametrize(("patience", "steps"), [(1, 3), (2, 4), (3, 8)])
def test_a_stage_stops_after_patience_evaluations_without_a_better_one(
    new_run: Runs, tmp_path: Path, patience: int, steps: int
) -> None:
    figures = [0.5, 0.6, 0.7, 0.7, 0.69, 0.71, 0.5, 0.5, 0.5, *[0.1] * 99]
    toy = Toy(new_run(tmp_path), figures=figures, evaluations_per_epoch=99, patience=patience)
    toy.train()
    assert toy.loop.step == steps


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (1, 5), (1.6, 8)])
def test_epochs_may_be_fractions(new_run: Runs, tmp_path: Path, epochs: float, steps: int) -> None:
    toy = Toy(new_run(tmp_path), length=5, epochs=epochs)
    toy.train()
    assert toy.loop.step == steps


def test_small_data_is_gone_through_until_it_makes_the_least_number_of_steps(new_run: Runs, tmp_path: Path) -> None:
    schedule = {"epochs": 2, "evaluations_per_epoch": 2}
    small = Toy(new_run(tmp_path / "small"), length=3, min_steps=40, **schedule)
    enough = Toy(new_run(tmp_path / "enough"), length=21, min_steps=40, **schedule)
    for toy in (small, enough):
        toy.train()
    assert [figures["step"] for figures in small.loop.evaluations] == [0, 10, 20, 30, 40]
    assert enough.loop.step == 42


def test_rates_warm_up_then_fall_to_zero_each_group_by_its_factor(new_run: Runs, tmp_path: Path) -> None:
    toy = Toy(new_run(tmp_path), length=10, epochs=1, warmup=0.3, learning_rate=1.0)
    rates: list[list[float]] = []
    toy.train(lambda step: rates.append([group["lr"] for group in toy.loop.optimizer.param_groups]))
    first = [rate for rate, _ in rates]
    assert first == pytest.approx([1 / 3, 2 / 3 * 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert [half for _, half in rates] == pytest.approx([rate / 2 for rate in first])


def test_a_step_in_parts_is_the_step_in_one(new_run: Runs, tmp_path: Path) -> None:
    whole, parts = Toy(new_run(tmp_path / "whole")), Toy(new_run(tmp_path / "parts"))
    for target_3 in whole.loop.steps():
        whole.loop.backward((whole.weight * target_3).sum() + whole.bias)
    for target_3 in parts.loop.steps():
        for index in range(3):
            parts.loop.backward(parts.weight[index] * target_3[index])
        parts.loop.backward(parts.bias * 1)
    torch.testing.assert_close(parts.weight, whole.weight)
    torch.testing.assert_close(parts.bias, whole.bias)


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    assert derived_seed(0, "adapt", 1) == derived_seed(0, "adapt", 1) == 1744339526013779339
    assert len({derived_seed(seed, name, step) for seed in (0, 1) for name in ("a", "b") for step in (1, 11)}) == 8
    assert derived_seed(1, 1) != derived_seed(11)


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_the_second_moment_decays_as_the_schedule_says(new_run: Runs, tmp_path: Path, decay: float) -> None:
    toy = Toy(new_run(tmp_path), length=1, epochs=1, second_moment=decay, gradient_norm=1e9)
    gradients: list[Tensor] = []
    toy.weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
    toy.train()
    [gradient] = gradients
    kept = toy.loop.optimizer.state[toy.weight]["exp_avg_sq"]
    torch.testing.assert_close(kept, (1 - decay) * gradient.square())
