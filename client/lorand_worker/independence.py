"""Whether an example's loss is its own: what noise for one example rests on."""

from collections.abc import Sequence
from typing import Final, Protocol

import torch
from torch import nn

from lorand.errors import ModelError

COMPARED: Final = 4


class HasLosses(Protocol):
    """A task, as far as it matters here."""

    def __len__(self) -> int:
        """Number of examples."""

    def losses(self, batch: Sequence[int]) -> torch.Tensor:
        """Return each example's loss, shape (batch,)."""


@torch.no_grad()
def check(module: nn.Module, task: HasLosses) -> None:
    """Raise ModelError for a model in which examples influence each other's losses.

    In a private run each example passes alone (`noised.alone`), so that nothing of others is in its
    pass. What is left is state: layers that learn from what passes, and whatever makes an example's
    loss another one after others passed. Batch normalisation is refused as such.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"{name} is a batch normalisation, which mixes examples: a private run needs a "
                "model without; start one with another model"
            )
    chosen = range(min(COMPARED, len(task)))
    first = {example: task.losses([example]) for example in chosen}
    for example in reversed(chosen):
        again = task.losses([example])
        if not torch.allclose(first[example], again, rtol=1e-5, atol=1e-6, equal_nan=True):
            raise ModelError(
                f"the loss of an example was {float(first[example]):.6g} and, after others had "
                f"passed, {float(again):.6g}: this model keeps something of what it sees, or adds "
                "randomness of its own; a private run needs one that does not"
            )
