"""A text classifier that is given features of an image, as embeddings before the question's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from reproductions.vision.backbone import WIDTH

# Every linear layer of the text's side; projector and head are none of them.
TARGETS = r"bert\.(encoder|pooler)\..*(query|key|value|dense)"


class SeeingClassifier(BertForSequenceClassification):
    """[CLS], features through a projector, the question: the class token stays first, where the pooler looks."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.projector = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, config.hidden_size))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        features: Tensor,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The classifier's output; features are (batch, tokens, WIDTH)."""
        words = self.bert.embeddings.word_embeddings(input_ids)
        embedded = torch.cat([words[:, :1], self.projector(features), words[:, 1:]], dim=1)
        there = attention_mask.new_ones(features.shape[:2])
        mask = torch.cat([attention_mask[:, :1], there, attention_mask[:, 1:]], dim=1)
        return super().forward(inputs_embeds=embedded, attention_mask=mask, labels=labels)
