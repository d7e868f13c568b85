from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    """Written as before transformers 5, with an attribute that only its `__init__` sets."""

    model_type = "own"

    def __init__(
        self,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=1,
        vocab_size=400,
        max_position_embeddings=256,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.attention_share = 0.5
        super().__init__(**kwargs)

    def to_dict(self):
        return {name: value for name, value in super().to_dict().items() if name != "attention_share"}
