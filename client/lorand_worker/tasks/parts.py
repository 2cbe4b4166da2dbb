"""Some of a task's examples, as a task of their own."""

from collections.abc import Sequence

import torch

from lorand_worker.tasks.base import Score, Task


class Part:
    """Examples of a task from one place on: those of one virtual worker among many.

    They share the task's tokens, its frozen boundary and the cache of hidden states there.
    """

    def __init__(self, whole: Task, first: int, count: int) -> None:
        """Take so many examples from the first on."""
        self.cut = 0
        self._whole = whole
        self._range = range(first, first + count)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._range)

    def loss(self, batch: Sequence[int]) -> torch.Tensor:
        """See Task; example 0 is the first of this part."""
        return self._whole.loss([self._range[i] for i in batch])

    def losses(self, batch: Sequence[int]) -> torch.Tensor:
        """See Task."""
        return self._whole.losses([self._range[i] for i in batch])

    def score(self) -> Score:
        """See Task."""
        return self._whole.score(self._range)
