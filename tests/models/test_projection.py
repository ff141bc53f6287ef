import torch

from models.projection import CollabProjection, WarmProjection


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


def test_rescaling_reaches_the_norm_and_keeps_directions() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(40, 6)
    for projection in (CollabProjection(6, 10, 8), WarmProjection(6)):
        before = projection(vectors).detach()
        projection.rescale(vectors, 3.5)
        after = projection(vectors).detach()
        assert abs(float(after.norm(dim=-1).mean()) - 3.5) < 1e-4
        torch.testing.assert_close(torch.cosine_similarity(before, after), torch.ones(40))
