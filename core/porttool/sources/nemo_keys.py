"""Keys of NeMo's model_config.yaml that change no arithmetic of a forward pass, and those fixed.

A key that is in none of these lists and that the converter does not read is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from porttool.errors import SourceError

FIXED: dict[str, Any] = {
    "transformer_block_type": "pre_ln",
    "attention_type": "multihead",
    "headscale": False,
    "normalize_attention_scores": True,
    "seq_len_interpolation_factor": None,
    "rotary_interleaved": False,
    "qk_layernorm": False,
    "window_size": None,
    "num_moe_experts": None,
    "multi_query_attention": False,
    "virtual_pipeline_model_parallel_size": None,
    "scale_positional_embedding": False,
    "embedding_scale": None,
    "add_position_embedding": True,
    "input_embedding_fusion": False,
    "mcore_customization_config": None,
}
"""Keys that would change the model unless they have this value."""

TRAINING = (
    "name", "target", "nemo_version", "precision", "seed", "data", "optim", "inference", "peft",
    "rlhf", "dpo", "ppo", "grpo", "spin", "kto", "rs", "reinforce", "knowledge_distillation",
    "steerlm*", "steerable_attributes", "kd_teacher_restore_from_path", "reset_lr*",
    "*megatron_timer*", "use_distributed_optimizer", "moe_*",
    "pipeline_model_parallel_split_rank",
    "micro_batch_size", "global_batch_size", "rampup_batch_size", "resume_from_checkpoint",
    "restore_from_path", "gradient_*", "grad_*", "init_method_std", "use_scaled_init_method",
    "*dropout", "do_layer_norm_weight_decay", "native_amp_*", "hysteresis", "fp32_residual_*",
    "fp16_lm_*", "megatron_amp_O2", "activations_checkpoint_*", "num_micro_batches_with_*",
    "sequence_parallel", "context_parallel_size", "expert_model_parallel_size", "nsys_profile",
    "use_cpu_initialization", "apex_transformer_log_level", "sync_batch_comm", "dist_ckpt_*",
    "fsdp*", "save_nemo_*", "answer_only_loss", "check_for_nan_in_grad", "batch_p2p_comm",
    "overlap_p2p_comm", "distributed_adam_*", "defer_embedding_*", "wgrad_*", "deterministic_mode",
    "cpu_offloading*", "gc_interval", "memory_profile", "sampling_params", "length_params",
    "pretrained_checkpoint", "output_sequence", "use_avg_pool", "log_*", "hidden_size_per_layer",
    "make_vocab_size_divisible_by", "encoder_seq_length", "seq_length", "tokenizer_type",
)  # fmt: skip
"""How it was trained, stored and padded."""

KERNELS = (
    "onnx_safe", "persist_layer_norm", "masked_softmax_fusion", "bias_dropout_*", "fp8*",
    "transformer_engine", "use_flash_attention", "apply_rope_fusion", "cross_entropy_loss_fusion",
    "get_attention_mask_from_fusion", "use_emha", "ub_*", "tp_comm_*", "low_precision_layernorm",
    "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "mcore_gpt", "pre_process",
    "post_process", "reduce_amax", "use_te_rng_tracker", "enable_cuda_graph", "nccl_*",
    "sharp", "disable_parameter_transpose_cache", "external_cuda_graph",
)  # fmt: skip
"""With which kernels it was computed. Scaling scores by the layer is undone in their softmax."""


def accounted_keys(values: Mapping[str, Any], where: str) -> list[str]:
    """Return the keys that need no reading; SourceError for a fixed one with another value."""
    for key, wanted in FIXED.items():
        value = values.get(key, wanted)
        off = value in (None, []) or (isinstance(value, Mapping) and not any(value.values()))
        if value != wanted and (wanted or not off):
            raise SourceError(
                f"{where}: {key!r} is {value!r:.80}, which porttool cannot port; "
                f"it needs {wanted!r}"
            )
    known = (*FIXED, *TRAINING, *KERNELS)
    return [key for key in values if any(fnmatchcase(key, pattern) for pattern in known)]
