"""Llama in Hugging Face's layout: which config keys matter, and what each tensor is called."""

from typing import ClassVar

from porttool import HuggingFaceConverter, ModelConfig, SourceConfig, WeightMap, concat, take


class LlamaConverter(HuggingFaceConverter):
    """LlamaForCausalLM with rotary angles as they were first published."""

    name = "llama"
    family = "llama"
    hub_id = "huggyllama/llama-7b"
    model_types: ClassVar[frozenset[str]] = frozenset({"llama"})
    prefix = "model."

    def read_config(self, config: SourceConfig) -> ModelConfig:
        """Read every key of LlamaConfig that changes the arithmetic."""
        config.ignore("attention_dropout", "pretraining_tp")
        n_head = config.integer("num_attention_heads")
        d_model = config.integer("hidden_size")
        head_dim = config.integer("head_dim", d_model // n_head)
        attention_bias = config.flag("attention_bias", False)
        return ModelConfig(
            vocab_size=config.integer("vocab_size"),
            n_positions=config.integer("max_position_embeddings"),
            n_layer=config.integer("num_hidden_layers"),
            n_head=n_head,
            n_kv_head=config.integer("num_key_value_heads", n_head),
            head_dim=head_dim,
            d_model=d_model,
            d_ff=config.integer("intermediate_size"),
            activation=config.one_of("hidden_act", {"silu": "silu", "gelu": "gelu"}, "silu"),
            gated=True,
            norm="rmsnorm",
            norm_bias=False,
            norm_eps=config.number("rms_norm_eps", 1e-6),
            position="rotary",
            rotary_base=read_rotary_base(config),
            attention_scale=head_dim**-0.5,
            qkv_bias=attention_bias,
            out_bias=attention_bias,
            mlp_bias=config.flag("mlp_bias", False),
            tied_head=config.flag("tie_word_embeddings", False),
        )

    def weight_map(self, config: ModelConfig) -> WeightMap:
        """Say of which source tensors each canonical one is made; `{i}` stands for the layer."""
        rules = {
            "embedding.weight": take("embed_tokens.weight"),
            "norm.weight": take("norm.weight"),
            "head.weight": take("lm_head.weight"),
            "layers.{i}.norm1.weight": take("layers.{i}.input_layernorm.weight"),
            "layers.{i}.norm2.weight": take("layers.{i}.post_attention_layernorm.weight"),
        }
        joined = {
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention.out": ("self_attn.o_proj",),
            "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.down": ("mlp.down_proj",),
        }
        for part in ("weight", "bias"):
            for ours, theirs in joined.items():
                names = [f"layers.{{i}}.{name}.{part}" for name in theirs]
                rules[f"layers.{{i}}.{ours}.{part}"] = take(*names, via=concat)
        copies = {"lm_head.weight": "embed_tokens.weight"} if config.tied_head else {}
        return WeightMap(rules, unused=("*.rotary_emb.inv_freq",), duplicates=copies)


def read_rotary_base(config: SourceConfig) -> float:
    """Read the base of the rotary angles, wherever it stands; rescaled angles are refused."""
    base = config.number("rope_theta", 10000.0)
    for place in (config.section("rope_scaling"), config.section("rope_parameters")):
        place.one_of("rope_type", {"default": True}, "default")
        base = place.number("rope_theta", base)
    return base
