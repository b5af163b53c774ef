"""What a rank says of others with which it cannot communicate. Real groups: training/test_ranks."""

import pytest
import torch
import torch.distributed as dist

from sklearn_gradfeat.data import _ranks


@pytest.fixture
def group(monkeypatch):
    """Rank 0 of three, in a fit. The others are numbers in the store."""
    monkeypatch.setattr(_ranks, "_SOON", 0)
    monkeypatch.setattr(_ranks, "_BEAT", 0.01)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = _ranks._Group()
    group.size = 3
    yield group
    group.close()
    dist.destroy_process_group()


class Alive:
    """Signs of life that go on, unless a rank is lost or has never come."""

    def __init__(self, n_calls, lost=(), absent=()):
        self.n_calls, self.lost, self.absent, self.count = n_calls, lost, absent, 0

    def __call__(self, rank):
        self.count += 1
        if rank in self.absent:
            return ""
        return f"{7 if rank in self.lost else self.count} {self.n_calls[rank]}"


@pytest.mark.parametrize(
    ("signs", "message"),
    [
        (Alive([5, 5, 5], lost=[2]), "Rank 2 gives no sign of life: the process has ended"),
        (Alive([5, 5, 5], lost=[1, 2]), "Rank 1, rank 2 gives no sign of life"),
        (Alive([5, 5, 5], absent=[1]), "Rank 1 did not call fit before the timeout of the process"),
        (Alive([5, 5, 3]), "Rank 2 did not answer"),
        (Alive([5, 5, 5]), "A rank did not answer"),
    ],
)
def test_the_message_names_the_rank(group, monkeypatch, signs, message):
    group._beats.n_calls = 5
    monkeypatch.setattr(group._beats, "sign", signs)
    text = group._diagnosis(RuntimeError("reset by peer"))
    assert text.startswith(message)
    assert text.endswith("reset by peer")


def test_the_message_of_a_rank_that_has_left(group):
    group._beats.leave("Rank 2 stopped: MemoryError")
    assert group._diagnosis(RuntimeError()) == "Rank 2 stopped: MemoryError"


def test_a_store_that_is_lost(group, monkeypatch):
    def lost(_):
        raise RuntimeError("connection reset")

    monkeypatch.setattr(group._beats, "sign", lost)
    assert "store of the process group does not answer" in group._diagnosis(RuntimeError())


def test_no_wait_for_a_rank_that_is_silent(group, monkeypatch):
    """A collective that never completes ends when the next rank gives no sign."""

    class Work:
        def is_completed(self):
            return False

    monkeypatch.setattr(_ranks, "_LATE", 0.05)
    monkeypatch.setattr(group._beats, "sign", Alive([0, 0, 0], lost=[1]))
    with pytest.raises(RuntimeError, match="Rank 1 gives no sign of life"):
        group._wait(Work)


def test_a_collective_without_memory_names_no_rank(group):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA"):
        group._wait(full)
