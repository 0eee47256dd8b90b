"""Small language models with the heads of Phi-2 (80 wide) and SmolLM2 (grouped queries, 9/3)."""

from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

SIZES = {
    "vocab_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
}
ARCHITECTURES = {
    "phi": lambda: PhiForCausalLM(
        PhiConfig(**SIZES, hidden_size=160, num_attention_heads=2, pad_token_id=None)
    ),
    "grouped": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, hidden_size=144, num_attention_heads=9, num_key_value_heads=3)
    ),
}
