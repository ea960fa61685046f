"""What holds among processes of one job, asserted in each of them: `python team_laws.py FILE RANK SIZE`."""

import sys

import pytest
import torch
from torch import distributed as dist
from torch import nn

from chanscale.errors import TrainingError
from chanscale.team import (
    Portion,
    agree,
    alone,
    merge_parts,
    own_parts,
    require_same,
    share_gradients,
    sum_gradients,
    team_rank,
    team_size,
)


def rows_come_back_in_order(count):
    everything = torch.arange(3 * count).view(count, 3)
    portion = Portion(range(count))
    assert torch.equal(portion.gather(everything[torch.as_tensor(portion.own)]), everything)
    if count >= team_size():
        assert len(portion.own) < count or team_size() == 1


def gradients_are_those_of_one_process(images, micro_batch):
    torch.manual_seed(0)
    trunk, head, x = nn.Linear(4, 5), nn.Linear(5, 1), torch.randn(images, 4)

    def loss(features):  # by the statistics of the whole batch, as the head of a classifier
        return head((features - features.mean(0)) / features.std(0)).square().mean()

    wanted = torch.autograd.grad(loss(trunk(x)), [*trunk.parameters(), *head.parameters()])
    parts = x.split(micro_batch)
    value = loss(merge_parts([trunk(part) for part in own_parts(parts)], parts))
    value.backward()
    sum_gradients(trunk.parameters())
    share_gradients(head.parameters())
    for parameter, gradient in zip([*trunk.parameters(), *head.parameters()], wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    require_same([parameter.grad for parameter in trunk.parameters()], "gradients")


def what_nobody_has_stays_absent():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    if team_rank() == 1:
        parameters[0].grad = torch.tensor([3.0, 4.0])
    parameters[1].grad = torch.full((2,), float(team_rank()))
    sum_gradients(parameters)
    assert parameters[0].grad.tolist() == [3, 4]
    assert parameters[1].grad.tolist() == [sum(range(team_size()))] * 2
    assert parameters[2].grad is None


def all_hear_the_first_and_a_difference_is_found():
    assert agree({"rank": team_rank()}) == {"rank": 0}
    require_same([torch.ones(3)], "channels")
    with pytest.raises(TrainingError, match="no longer have the same channels"):
        require_same([torch.tensor([float(team_rank())])], "channels")
    with alone():
        assert team_size() == 1
        assert Portion(range(9)).own.tolist() == list(range(9))


if __name__ == "__main__":
    place, rank, size = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=int(rank), world_size=int(size))
    for number in (1, 2, 3, 7, 10):
        rows_come_back_in_order(number)
    for batch in ((20, 5), (8, 3), (4, 3), (7, 7)):  # in the last, one process computes all
        gradients_are_those_of_one_process(*batch)
    what_nobody_has_stays_absent()
    all_hear_the_first_and_a_difference_is_found()
    dist.destroy_process_group()
    sys.stdout.write("all laws hold\n")
