import torch

from models.projection import BIAS_SPREAD, CollabProjection, WarmProjection


def test_standardizing_changes_the_numbers_and_not_the_function() -> None:
    torch.manual_seed(0)
    projection = CollabProjection(6, 10, 8)
    users = torch.randn(50, 6) * 0.1 + torch.tensor([0, 0, 0, 0, 0, 1.0])
    items = torch.randn(70, 6) * 0.1 + torch.tensor([0, 0, 0, 0, 1.0, 0.5])
    before, weight = projection(items), projection.inner.weight.clone()
    projection.standardize(users, items)
    projection.standardize(users * 2, items)  # and again, from a standardized state
    torch.testing.assert_close(projection(items), before, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(projection.inner.weight, weight)


def test_both_biases_vary_alike_before_the_projection_and_the_factors_keep_their_proportions() -> None:
    torch.manual_seed(0)
    users = torch.randn(500, 6) * torch.tensor([0.02, 0.02, 0.04, 0.02, 0.1, 0.0]) + torch.tensor([0, 0, 0, 0, 0, 1.0])
    items = torch.randn(700, 6) * torch.tensor([0.02, 0.02, 0.04, 0.02, 0.0, 0.3]) + torch.tensor(
        [0, 0, 0, 0, 1.0, 0.5]
    )
    projection = CollabProjection(6, 10, 8)
    projection.standardize(users, items)
    inputs: list[torch.Tensor] = []
    projection.inner.register_forward_pre_hook(lambda _, given: inputs.append(given[0].std(0)))
    projection(users), projection(items)
    of_users, of_items = inputs
    torch.testing.assert_close(of_users[4:], torch.tensor([BIAS_SPREAD, 0.0]), atol=0.01, rtol=0)
    torch.testing.assert_close(of_items[4:], torch.tensor([0.0, BIAS_SPREAD]), atol=0.01, rtol=0)
    torch.testing.assert_close(of_users[:4] / of_users[0], users.std(0)[:4] / users.std(0)[0])


def test_one_user_alone_is_standardized_too() -> None:
    projection = CollabProjection(4, 10, 8)
    projection.standardize(torch.randn(1, 4), torch.randn(30, 4))
    assert projection(torch.randn(5, 4)).isfinite().all()


def test_outputs_start_around_the_neutral_embedding_at_the_distance_and_keep_their_differences() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(40, 6)
    for projection, width in ((CollabProjection(6, 10, 8), 8), (WarmProjection(6), 6)):
        before, neutral = projection(vectors).detach(), torch.randn(width)
        projection.start_at(vectors, neutral, 3.5)
        after = projection(vectors).detach()
        torch.testing.assert_close(after.mean(0), neutral, atol=1e-5, rtol=0)
        away, was_away = after - neutral, before - before.mean(0)
        assert abs(float(away.norm(dim=-1).mean()) - 3.5) < 1e-4
        torch.testing.assert_close(torch.cosine_similarity(away, was_away), torch.ones(40))
