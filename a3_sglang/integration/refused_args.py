"""Options of SGLang's server that a3 is known to be wrong with, over all supported releases."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    """A part of SGLang that a3 cannot run with.

    Attributes:
        reason: completes the sentence "``--option``: ..."
        switches: options that turn it on; refused whether the user or SGLang itself set them.
        details: options that only matter once it is on; refused if the user set them.
    """

    reason: str
    switches: tuple[str, ...]
    details: tuple[str, ...] = ()


REFUSED = (
    Feature("without a radix cache there is no tree to reuse from", ("disable_radix_cache",)),
    Feature("multi-item scoring runs without a radix cache", ("enable_mis",)),
    Feature("without a KV cache there is nothing to reuse", ("prefill_only_disable_kv_cache",)),
    Feature("embedding and reward models are not supported", ("is_embedding",)),
    Feature("KV events would name tokens of approximate paths that no prompt has", ("kv_events_config",)),
    Feature("log-probabilities of a reused prompt are not the trainer's", ("rl_on_policy_target",)),
    Feature(
        "the hierarchical cache is not supported yet",
        ("enable_hierarchical_cache",),
        (
            "hicache_host_memory_mode",
            "hicache_ratio",
            "hicache_size",
            "hicache_host_memory_fraction",
            "hicache_write_policy",
            "hicache_io_backend",
            "hicache_mem_layout",
            "hicache_storage_backend",
            "hicache_storage_prefetch_policy",
            "hicache_storage_backend_extra_config",
            "hicache_storage_prefetch_retry_poll_interval",
            "hicache_storage_prefetch_retry_max_attempts",
        ),
    ),
    Feature("LMCache is another radix cache; drop one of the two", ("enable_lmcache",), ("lmcache_config_file",)),
    Feature("FlexKV is another radix cache; drop one of the two", ("enable_flexkv",), ("flexkv_config_file",)),
    Feature(
        "an external cache linker is not supported",
        ("enable_unified_cache_external_linker",),
        ("unified_cache_external_linker_backend", "unified_cache_external_linker_config", "enable_linker_mla_dedup"),
    ),
    Feature("hierarchical sparse attention is not supported", ("enable_hisparse",), ("hisparse_config",)),
    Feature("streaming sessions are not supported", ("enable_streaming_session",)),
    Feature(
        "LoRA is not supported yet; recompute would run with the adapters of the previous batch",
        ("enable_lora", "lora_paths"),
        (
            "enable_lora_overlap_loading",
            "max_lora_rank",
            "lora_target_modules",
            "max_loaded_loras",
            "max_loras_per_batch",
            "lora_eviction_policy",
            "lora_backend",
            "max_lora_chunk_size",
            "experts_shared_outer_loras",
            "lora_use_virtual_experts",
            "lora_strict_loading",
            "lora_drain_wait_threshold",
        ),
    ),
    Feature(
        "speculative decoding is not supported yet",
        ("speculative_algorithm", "decoupled_spec_role"),
        (
            "decoupled_spec_bind_endpoint",
            "decoupled_spec_connect_endpoints",
            "decoupled_spec_rank",
            "uno_lora_path",
            "speculative_draft_model_path",
            "speculative_boundary_reduction",
            "speculative_draft_model_revision",
            "speculative_draft_load_format",
            "speculative_num_steps",
            "speculative_eagle_topk",
            "speculative_num_draft_tokens",
            "speculative_dflash_block_size",
            "speculative_domino_candidate_pool_size",
            "speculative_dspark_block_size",
            "speculative_dspark_sps_table_path",
            "speculative_dspark_confidence_sts_path",
            "speculative_dspark_align_verify_tokens_to_graph_tier",
            "speculative_accept_threshold_single",
            "speculative_accept_threshold_acc",
            "speculative_use_rejection_sampling",
            "speculative_use_block_verification",
            "speculative_token_map",
            "speculative_attention_mode",
            "speculative_draft_attention_backend",
            "speculative_dsa_topk_backend",
            "speculative_draft_kv_cache_dtype",
            "speculative_draft_window_size",
            "speculative_draft_sink_size",
            "speculative_moe_runner_backend",
            "speculative_moe_a2a_backend",
            "speculative_enable_w4a4_mxfp4_megamoe",
            "speculative_draft_model_quantization",
            "_speculative_draft_quantization_explicitly_set",
            "speculative_skip_dp_mlp_sync",
            "enable_multi_layer_eagle",
            "speculative_adaptive",
            "speculative_adaptive_config",
            "spec_trace_dir",
            "speculative_ngram_min_bfs_breadth",
            "speculative_ngram_max_bfs_breadth",
            "speculative_ngram_match_type",
            "speculative_ngram_max_trie_depth",
            "speculative_ngram_capacity",
            "speculative_ngram_external_corpus_path",
            "speculative_ngram_external_sam_budget",
            "speculative_ngram_external_corpus_max_tokens",
            "decrypted_draft_config_file",
            "enable_draft_weights_cpu_backup",
        ),
    ),
    Feature(
        "the model then returns a tuple, which a3 does not handle",
        ("enable_return_aux_hidden_states",),
        ("aux_hidden_state_capture", "return_aux_hidden_state_layer_ids"),
    ),
    Feature(
        "requests would get what was recorded in a3's own passes",
        ("enable_return_routed_experts", "enable_return_indexer_topk"),
    ),
    Feature(
        "diffusion models attend in both directions, a3 is causal",
        ("dllm_algorithm",),
        ("dllm_algorithm_config", "dllm_fdfo"),
    ),
    Feature(
        "the canary would report copied KV as corrupt",
        ("kv_canary",),
        ("kv_canary_real_data", "kv_canary_sweep_interval"),
    ),
    Feature(
        "multiplexed prefills skip the step that fills reused KV",
        ("enable_pdmux",),
        ("pdmux_config_path", "sm_group_num"),
    ),
    Feature("two-batch overlap is not supported", ("enable_two_batch_overlap",), ("tbo_token_distribution_threshold",)),
    Feature("tensor parallelism is not supported yet", ("tp_size",)),
    Feature(
        "pipeline parallelism is not supported yet",
        ("pp_size",),
        ("pp_max_micro_batch_size", "pp_async_batch_depth", "enable_dynamic_chunking"),
    ),
    Feature(
        "context parallelism is not supported yet",
        (
            "dcp_size",
            "attn_cp_size",
            "enable_prefill_cp",
            "enable_prefill_context_parallel",
            "enable_dsa_prefill_context_parallel",
            "enable_kv_cache_sharding",
        ),
        (
            "dcp_comm_backend",
            "dcp_replicate_q_proj",
            "cp_strategy",
            "prefill_cp_mode",
            "dsa_prefill_cp_mode",
            "enable_dsa_cache_layer_split",
            "enable_cp_decode_attn_tp",
            "enable_cp_tp_group_sharing",
        ),
    ),
    Feature(
        "data-parallel attention is not supported (--dp-size is)",
        ("enable_dp_attention", "attn_dp_size"),
        ("enable_dp_attention_local_control_broadcast", "enable_dp_lm_head", "enable_tp_lm_head_all_to_all"),
    ),
    Feature(
        "expert parallelism is not supported yet",
        (
            "ep_size",
            "moe_dp_size",
            "dwdp_size",
            "moe_a2a_backend",
            "enable_eplb",
            "elastic_ep_backend",
            "elastic_ep_rejoin",
            "enable_elastic_expert_backup",
            "ep_join_mode",
        ),
        (
            "ep_num_redundant_experts",
            "ep_dispatch_algorithm",
            "init_expert_location",
            "eplb_algorithm",
            "eplb_rebalance_num_iterations",
            "eplb_rebalance_layers_per_chunk",
            "eplb_min_rebalancing_utilization_threshold",
            "deepep_mode",
            "deepep_config",
            "deepep_v2_mode",
            "deepep_dispatcher_output_dtype",
            "fuseep_mode",
            "flashinfer_a2a_dispatch_type",
            "mooncake_ib_device",
            "elastic_ep_scale_timeout",
            "elastic_ep_initial_size",
            "ep_join_rank_offset",
            "max_ep_size",
        ),
    ),
    Feature(
        "prefill and decode on separate servers are not supported",
        ("disaggregation_mode", "encoder_only", "language_only"),
        (
            "disaggregation_decode_allocation_policy",
            "disaggregation_transfer_backend",
            "disaggregation_enable_kv_checksum",
            "disaggregation_bootstrap_port",
            "disaggregation_ib_device",
            "disaggregation_decode_enable_radix_cache",
            "disaggregation_decode_enable_offload_kvcache",
            "disaggregation_decode_retraction_backup",
            "disaggregation_decode_extra_slots",
            "disaggregation_decode_polling_interval",
            "disaggregation_decode_host_receive_threshold",
            "num_reserved_decode_tokens",
            "enable_pd_role_switch",
            "optimistic_prefill_attempts",
            "encoder_transfer_backend",
            "encoder_urls",
            "encoder_bootstrap_port",
            "encoder_register_urls",
            "enable_adaptive_dispatch_to_encoder",
        ),
    ),
    Feature(
        "SGLang loads no plugins in these processes, so custom_params would not be checked",
        ("tokenizer_worker_num",),
        ("enable_http_worker_reuseport",),
    ),
    Feature(
        "this gRPC server bypasses the tokenizer manager, so custom_params would not be checked; use --grpc-port",
        ("smg_grpc_mode", "grpc_mode"),
        ("smg_http_sidecar_port",),
    ),
    Feature("SGLang loads no plugins in Ray's actors", ("use_ray",)),
)
"""What a3 is known to be wrong with; ``--a3-allow`` does not lift it."""

REFUSED_VARIABLES = {
    "SGLANG_RUST_SERVER": "SGLang's server in Rust loads no plugins, so custom_params would not be checked",
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "the KV pool would take the memory that a3's passes need",
}
"""Environment variables that enable features a3 does not work with, and why."""
