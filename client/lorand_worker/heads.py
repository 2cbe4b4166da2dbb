"""What stands on a base model's layers and answers: a classifier, or its own vocabulary."""

from typing import Any

import torch
from torch import nn

Places = tuple[torch.Tensor, torch.Tensor]
"""Row (example) and column (token) of each place that is answered, shape (places,) each."""


class PooledClassifier(nn.Module):
    """Encoder → mean over tokens → unit length × feature_scale → linear head (zero at first)."""

    def __init__(
        self, encoder: nn.Module, width: int, num_labels: int, feature_scale: float
    ) -> None:
        """Build the head; the encoder's pooler, if any, is not used."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, num_labels)
        self.feature_scale = feature_scale

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (batch, num_labels), from token ids of shape (batch, length)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
        unit = nn.functional.normalize(mean, dim=-1)
        return torch.as_tensor(self.head(unit * self.feature_scale))


class OwnClassifier(nn.Module):
    """A Hugging Face sequence-classification model with its own head."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap the model."""
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (batch, num_labels)."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return torch.as_tensor(output.logits)


class LanguageModel(nn.Module):
    """A Hugging Face masked or causal language model, answering only at the places asked for.

    A vocabulary is large: logits at every token of a batch would take more memory than the pass.
    """

    def __init__(self, model: nn.Module, *, masked: bool) -> None:
        """Wrap the model; `masked`: it fills masks, else it goes on after the last token."""
        super().__init__()
        self.model = model
        self.masked = masked

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, places: Places | None = None
    ) -> torch.Tensor:
        """Return logits over the vocabulary at the places, shape (places, vocabulary).

        Without places at every token, shape (batch, length, vocabulary).
        """

        def choose(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (inputs[0][places], *inputs[1:])

        head = None if places is None else self._head()
        hook = None if head is None else head.register_forward_pre_hook(choose)
        try:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        finally:
            if hook is not None:
                hook.remove()
        # A model whose head is not found has answered everywhere.
        chosen = logits if places is None or logits.dim() == 2 else logits[places]
        return torch.as_tensor(chosen)

    def _head(self) -> nn.Module | None:
        """The model's own part that ends in the output layer.

        Not the output layer itself: a backward pass that runs layers again may run all of that part
        again, when the choice of places is over.
        """
        model: Any = self.model
        output = model.get_output_embeddings()
        parts = [part for part in model.children() if any(m is output for m in part.modules())]
        return parts[0] if output is not None and len(parts) == 1 else None
