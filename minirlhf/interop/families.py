"""What other formats call our tensors and the fields of our config: Hugging Face's families, and GGUF.

One table per family; import and export read the same table.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's. In names of tensors, `*` is the number of the layer."""

    classes: tuple[str, ...]  # `architectures` with this layout; export writes the first
    model_type: str
    prefix: str  # of every name but the head's; files of the model without a head leave it out
    tensors: dict[str, str | tuple[str, ...]]  # our module -> theirs; of several, the rows are joined
    keys: dict[str, str]  # our config field -> their key
    fixed: dict  # values of our config fields that make a model one of this family
    defaults: dict  # values of their keys that files leave out
    needs: dict  # their keys that must have this value, if they are there
    unused: str  # regex of tensors that we do not compute with
    activation: tuple[str, dict[str, str]] = ("", {})  # their key, their name -> our mlp
    transposed: bool = False  # whether the blocks' matrices are stored as [in, out]
    rename: dict[str, str] = field(default_factory=dict)  # names in older files -> names in `tensors`
    window: bool = False  # whether `sliding_window` counts even without `use_sliding_window`


GPT2 = Family(
    classes=("GPT2LMHeadModel", "GPT2Model"),
    model_type="gpt2",
    prefix="transformer.",
    tensors={
        "wte": "wte",
        "wpe": "wpe",
        "ln_f": "ln_f",
        "head": "lm_head",
        "blocks.*.ln_1": "h.*.ln_1",
        "blocks.*.ln_2": "h.*.ln_2",
        "blocks.*.qkv": "h.*.attn.c_attn",
        "blocks.*.attn_out": "h.*.attn.c_proj",
        "blocks.*.fc": "h.*.mlp.c_fc",
        "blocks.*.mlp_out": "h.*.mlp.c_proj",
    },
    keys={
        "vocab_size": "vocab_size",
        "context": "n_positions",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_inner": "n_inner",
        "norm_eps": "layer_norm_epsilon",
        "tied": "tie_word_embeddings",
    },
    fixed={
        "norm": "layer",
        "positions": "learned",
        "bias": True,
        "causal": True,
        "n_bidirectional": 0,
        "pre_norm": True,
        "qk_norm": False,
    },
    defaults={
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "activation_function": "gelu_new",
    },
    needs={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    unused=r"h\.\d+\.attn\.(bias|masked_bias)",
    activation=(
        "activation_function",
        {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
    ),
    transposed=True,
)
LLAMA = Family(
    classes=("LlamaForCausalLM", "LlamaModel"),
    model_type="llama",
    prefix="model.",
    tensors={
        "wte": "embed_tokens",
        "ln_f": "norm",
        "head": "lm_head",
        "blocks.*.ln_1": "layers.*.input_layernorm",
        "blocks.*.ln_2": "layers.*.post_attention_layernorm",
        "blocks.*.qkv": (
            "layers.*.self_attn.q_proj",
            "layers.*.self_attn.k_proj",
            "layers.*.self_attn.v_proj",
        ),
        "blocks.*.attn_out": "layers.*.self_attn.o_proj",
        "blocks.*.fc": "layers.*.mlp.up_proj",
        "blocks.*.gate": "layers.*.mlp.gate_proj",
        "blocks.*.mlp_out": "layers.*.mlp.down_proj",
    },
    keys={
        "vocab_size": "vocab_size",
        "context": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "head_dim": "head_dim",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "tied": "tie_word_embeddings",
        "rope_theta": "rope_theta",
        "rope_scaling": "rope_scaling",
    },
    fixed={
        "norm": "rms",
        "positions": "rotary",
        "bias": False,
        "qkv_bias": False,
        "causal": True,
        "n_bidirectional": 0,
        "pre_norm": True,
        "qk_norm": False,
        "nope_layers": None,
    },
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    },
    needs={
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "rope_interleaved": False,
    },
    unused=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    activation=("hidden_act", {"silu": "swiglu", "swish": "swiglu"}),
)
QWEN2 = dataclasses.replace(
    LLAMA,
    classes=("Qwen2ForCausalLM", "Qwen2Model"),
    model_type="qwen2",
    fixed=LLAMA.fixed | {"qkv_bias": True},
    needs={},
    defaults=LLAMA.defaults | {"max_position_embeddings": 32768},
)
QWEN3 = dataclasses.replace(
    LLAMA,
    classes=("Qwen3ForCausalLM", "Qwen3Model"),
    model_type="qwen3",
    tensors=LLAMA.tensors
    | {f"blocks.*.{name}": f"layers.*.self_attn.{name}" for name in ("q_norm", "k_norm")},
    fixed=LLAMA.fixed | {"qk_norm": True},
    defaults=LLAMA.defaults | {"max_position_embeddings": 32768, "head_dim": 128},
)
# Without its window Mistral is Llama, and is exported as Llama.
MISTRAL = dataclasses.replace(
    LLAMA,
    classes=("MistralForCausalLM", "MistralModel"),
    model_type="mistral",
    defaults=LLAMA.defaults | {"max_position_embeddings": 131072},
    window=True,
)
SMOLLM3 = dataclasses.replace(
    LLAMA,
    classes=("SmolLM3ForCausalLM", "SmolLM3Model"),
    model_type="smollm3",
    fixed={key: value for key, value in LLAMA.fixed.items() if key != "nope_layers"},
    defaults=LLAMA.defaults
    | {"max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 2e6},
)
BERT = Family(
    classes=("BertModel", "BertForMaskedLM", "BertForPreTraining"),
    model_type="bert",
    prefix="bert.",
    tensors={
        "wte": "embeddings.word_embeddings",
        "wpe": "embeddings.position_embeddings",
        "ln_f": "embeddings.LayerNorm",
        "blocks.*.qkv": tuple(f"encoder.layer.*.attention.self.{name}" for name in ("query", "key", "value")),
        "blocks.*.attn_out": "encoder.layer.*.attention.output.dense",
        "blocks.*.ln_1": "encoder.layer.*.attention.output.LayerNorm",
        "blocks.*.ln_2": "encoder.layer.*.output.LayerNorm",
        "blocks.*.fc": "encoder.layer.*.intermediate.dense",
        "blocks.*.mlp_out": "encoder.layer.*.output.dense",
    },
    keys={
        "vocab_size": "vocab_size",
        "context": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "norm_eps": "layer_norm_eps",
    },
    fixed={
        "norm": "layer",
        "positions": "learned",
        "bias": True,
        "causal": False,
        "pre_norm": False,
        "tied": True,
        "qk_norm": False,
    },
    defaults={"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    needs={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
    unused=r"embeddings\.position_ids|pooler\..*|cls\..*",
    activation=("hidden_act", {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}),
    rename={".gamma": ".weight", ".beta": ".bias"},
)
FAMILIES = (GPT2, LLAMA, QWEN2, QWEN3, MISTRAL, SMOLLM3, BERT)
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"  # BERT's; here every token is of type 0
# What other architectures have, by a key of their config.json: why theirs is not computed here.
FEATURES = {
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "kv_lora_rank": "latent attention",
    "final_logit_softcapping": "logit soft-capping",
    "attn_logit_softcapping": "logit soft-capping",
    "partial_rotary_factor": "rotary positions of a part of the channels",
    "text_config": "more than text",
    "vision_config": "more than text",
}

# GGUF has one set of names for every architecture, but for GPT-2's joined q, k and v.
GGUF_TENSORS = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "head": "output",
    "blocks.*.ln_1": "blk.*.attn_norm",
    "blocks.*.ln_2": "blk.*.ffn_norm",
    "blocks.*.qkv": ("blk.*.attn_q", "blk.*.attn_k", "blk.*.attn_v"),
    "blocks.*.q_norm": "blk.*.attn_q_norm",
    "blocks.*.k_norm": "blk.*.attn_k_norm",
    "blocks.*.attn_out": "blk.*.attn_output",
    "blocks.*.fc": "blk.*.ffn_up",
    "blocks.*.gate": "blk.*.ffn_gate",
    "blocks.*.mlp_out": "blk.*.ffn_down",
}
GGUF_NEEDS = {
    "rope.scaling.type": "none",
    "attention.sliding_window": 0,
    "expert_count": 0,
    "use_parallel_residual": False,
}
GGUF_WIDTHS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
GGUF_KEYS = {
    "context": "context_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_embd": "embedding_length",
    "n_kv_head": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "n_inner": "feed_forward_length",
    "rope_theta": "rope.freq_base",
}
ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
