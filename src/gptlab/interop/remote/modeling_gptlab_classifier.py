"""A classifier that gptlab trained, for `transformers`: BERT's encoder with a linear layer on the first token.

    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)

BertForSequenceClassification has a pooler between the two, and RoBERTa's positions depend on the padding id.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class GPTLabClassifierConfig(BertConfig):
    model_type = "gptlab_classifier"
    position_offset: int = 2  # row of the position embedding for the first token


class GPTLabForSequenceClassification(BertPreTrainedModel):
    config_class = GPTLabClassifierConfig

    def __init__(self, config: GPTLabClassifierConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, len(config.id2label or {}))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> Any:
        """
        Args:
            input_ids: (B, T), padded at the end.
            attention_mask: (B, T), 0 for padding.
            labels: (B,) ids, or (B, labels) of 0 and 1 for several labels a text.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + self.config.position_offset
        hidden = self.bert(input_ids, attention_mask=attention_mask, position_ids=positions).last_hidden_state
        logits = self.classifier(self.dropout(hidden[:, 0]))  # (B, labels)
        loss = None
        if labels is not None:
            many = labels.dim() == 2
            wide = logits.float()
            loss = F.binary_cross_entropy_with_logits(wide, labels.float()) if many else F.cross_entropy(wide, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output
