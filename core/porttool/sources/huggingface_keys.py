"""Keys of Hugging Face's config.json that change nothing, and those that must have one value."""

from __future__ import annotations

from typing import Any

INERT_KEYS = frozenset({
    "_name_or_path", "_commit_hash", "architectures", "model_type", "transformers_version",
    "torch_dtype", "dtype", "use_cache", "output_past", "output_attentions",
    "output_hidden_states", "return_dict", "return_dict_in_generate", "initializer_range",
    "task_specific_params", "problem_type", "id2label", "label2id", "num_labels",
    "finetuning_task", "tokenizer_class", "prefix", "is_decoder", "max_length", "min_length",
    "do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty",
    "bos_token_id", "eos_token_id", "pad_token_id", "gradient_checkpointing",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx",
    "chunk_size_feed_forward", "predict_special_tokens", "_num_labels", "use_bfloat16",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "cls_token_id", "mask_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "no_repeat_ngram_size", "num_beam_groups",
    "num_return_sequences", "output_scores", "remove_invalid_values", "suppress_tokens",
    "tf_legacy_loss", "typical_p", "eos_token_ids", "xla_device", "_flash_attn_2_enabled",
    "_attn_implementation_internal", "apply_query_key_layer_scaling", "unsloth_version",
    "unsloth_fixed", "author", "created_date", "license",
})  # fmt: skip
"""Keys that change no arithmetic of a forward pass (dropout is off; special ids are read apart).

Files that older versions of transformers wrote hold every one of generation's, and some that have
long had no effect: those of gpt2-medium and distilgpt2 on the hub do. Scaling scores by the layer
is Megatron's, and undone in its softmax.
"""

MUST_BE: dict[str, Any] = {
    "add_cross_attention": False, "is_encoder_decoder": False, "cross_attention_hidden_size": None,
    "pruned_heads": {}, "tie_encoder_decoder": False, "quantization_config": None,
    "torchscript": False, "n_special": 0, "normalize_attention_scores": True,
}  # fmt: skip
"""Keys that would change the model unless they have this value."""
