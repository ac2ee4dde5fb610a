"""What a model's config says about how it can be split: facts, legal TP degrees, bytes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """Of one checkpoint, all from its config and index. Bytes are of the whole model, not of a rank."""

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    dtype_bytes: int
    tied_embeddings: bool
    context_length: int
    weight_bytes: int
    revision: str = ""

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes

    def legal_tp(self, most: int) -> tuple[int, ...]:
        """TP degrees up to `most` that SGLang can load: query heads and the MLP split evenly; KV heads split evenly or replicate evenly."""
        return tuple(
            tp
            for tp in range(1, most + 1)
            if self.num_heads % tp == 0
            and self.intermediate_size % tp == 0
            and (self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0)
        )
