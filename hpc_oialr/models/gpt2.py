"""Language model on bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hpc_oialr.data.base import Batch
from hpc_oialr.engines.tensor.pairs import ColumnRowPair
from hpc_oialr.errors import check_interval
from hpc_oialr.models.base import ModelConfig, stock_model


@dataclass(kw_only=True)
class GPT2(ModelConfig):
    """``transformers.GPT2LMHeadModel`` with one token per byte value.

    Parameters
    ----------
    dim, depth, heads
        Width, layers and attention heads.
    vocabulary
        Tokens; 256 for bytes.
    dropout
        Probability, in embeddings, residuals and attention.
    """

    # The attention's q, k and v are one packed layer, whose blocks are not whole heads.
    pairs = (ColumnRowPair("*.mlp", ("c_fc",), "c_proj"),)

    dim: int = 768
    depth: int = 12
    heads: int = 12
    vocabulary: int = 256
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.check_at_least(1, "dim", "depth", "heads", "vocabulary")
        self.check_divides("dim", "heads")
        check_interval("dropout", self.dropout, 0, 1, closed=(True, False))

    def build(self, example: Batch) -> nn.Module:
        """The model; its context is the data's sequence length."""
        tokens = self.require_input(example, "input_ids", "text")
        return stock_model(
            "GPT2LMHeadModel",
            vocab_size=self.vocabulary,
            n_positions=tokens.shape[1],
            n_embd=self.dim,
            n_layer=self.depth,
            n_head=self.heads,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            attn_implementation="sdpa",
        )
