"""Which options of SGLang's server a3 is right with, over all supported releases.

Three tables: options that change nothing a3 relies on (:data:`ALLOWED`, and :data:`ALLOWED_VALUES` for those of which
this holds for some values only), options a3 is known to be wrong with (:data:`REFUSED`), and options that
:mod:`a3_sglang.server.support` compares with the model or with a3's own options (:data:`CHECKED`). Every other option
is one whose effect is not known.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ALLOWED = frozenset(
    {
        # where configuration and weights come from; both are final before a3 looks at the model
        "model_path",
        "load_format",
        "model_loader_extra_config",
        "trust_remote_code",
        "revision",
        "model_config_parser",
        "json_model_override_args",
        "download_dir",
        "model_checksum",
        "delete_ckpt_after_loading",
        "decrypted_config_file",
        "custom_weight_loader",
        "weight_loader_disable_mmap",
        "weight_loader_prefetch_checkpoints",
        "weight_loader_prefetch_num_threads",
        "weight_loader_drop_cache_after_load",
        "weight_cache_mode",
        "weight_cache_socket",
        "weight_cache_timeout",
        "remote_instance_weight_loader_seed_instance_ip",
        "remote_instance_weight_loader_seed_instance_service_port",
        "remote_instance_weight_loader_send_weights_group_ports",
        "remote_instance_weight_loader_backend",
        "remote_instance_weight_loader_start_seed_via_transfer_engine",
        "modelexpress_config",
        "engine_info_bootstrap_port",
        # precision: a3's passes run the same modules; the KV's dtype is compared with the model's at start
        "dtype",
        "quantization",
        "context_length",
        "enable_fp32_lm_head",
        "enable_tf32_matmul",
        # kernels of projections, experts, decoding, sampling and grammars
        "grammar_backend",
        "fp8_gemm_runner_backend",
        "fp4_gemm_runner_backend",
        "bf16_gemm_backend",
        "moe_runner_backend",
        "flashinfer_mxfp4_moe_precision",
        "disable_flashinfer_autotune",
        "flashinfer_autotune_skip_ops",
        "triton_attention_reduce_in_fp32",
        "triton_attention_num_kv_splits",
        "triton_attention_split_tile_size",
        # CUDA graphs: a fused extend runs eagerly, everything else as in stock SGLang
        "cuda_graph_config",
        "cuda_graph_backend_decode",
        "cuda_graph_backend_prefill",
        "cuda_graph_max_bs_decode",
        "cuda_graph_max_bs_prefill",
        "cuda_graph_max_seq_len_prefill",
        "cuda_graph_bs_decode",
        "cuda_graph_bs_prefill",
        "cuda_graph_prefill_max_context",
        "cuda_graph_tc_compiler",
        "disable_cuda_graph",
        "disable_prefill_cuda_graph",
        "disable_decode_cuda_graph",
        "disable_cuda_graph_padding",
        "enable_profile_cuda_graph",
        "enable_cudagraph_gc",
        "torch_compile_max_bs",
        # size and eviction of the KV pool; releasing its memory flushes the cache first
        "mem_fraction_static",
        "max_total_tokens",
        "max_running_requests",
        "max_queued_requests",
        "page_size",
        "radix_cache_backend",
        "radix_eviction_policy",
        "radix_eviction_policy_config",
        "_radix_eviction_policy_explicitly_set",
        "enable_memory_saver",
        "enable_weights_cpu_backup",
        # scheduling: decides when a request is admitted, preempted or retracted, not what it computes
        "chunked_prefill_size",
        "max_prefill_tokens",
        "prefill_max_requests",
        "prefill_decode_interval",
        "prefill_decode_interval_min_bs",
        "min_free_slots_delay",
        "schedule_policy",
        "schedule_conservativeness",
        "enable_priority_scheduling",
        "disable_priority_preemption",
        "default_priority_value",
        "abort_on_priority_when_disabled",
        "schedule_low_priority_values_first",
        "priority_scheduling_preemption_threshold",
        "retraction_policy",
        "disable_overlap_schedule",
        "num_continuous_decode_steps",
        "scheduler_recv_interval",
        "enable_mixed_chunk",
        # processes and devices
        "base_gpu_id",
        "gpu_id_step",
        "numa_node",
        "random_seed",
        "watchdog_timeout",
        "soft_watchdog_timeout",
        "sleep_on_idle",
        "custom_sigquit_handler",
        "gc_threshold",
        "gc_warning_threshold_secs",
        "nccl_port",
        "dist_timeout",
        "dist_init_addr",
        "gated_launch_port",
        # replicas: each has a scheduler, a pool and an index of its own
        "dp_size",
        "load_balance_method",
        # collectives between GPUs, of which a replica has one
        "disable_custom_all_reduce",
        "enable_p2p_check",
        "enable_nccl_nvls",
        "enable_mscclpp",
        "pre_warm_nccl",
        # HTTP and the native gRPC server, whose requests pass the same tokenizer manager
        "host",
        "port",
        "fastapi_root_path",
        "ssl_keyfile",
        "ssl_certfile",
        "ssl_ca_certs",
        "ssl_keyfile_password",
        "enable_ssl_refresh",
        "api_key",
        "admin_api_key",
        "enable_http2",
        "http2_max_concurrent_streams",
        "http2_initial_connection_window_size",
        "grpc_port",
        "grpc_response_timeout_secs",
        "grpc_worker_threads",
        "served_model_name",
        "weight_version",
        "skip_server_warmup",
        "warmups",
        # tokenizers, templates, parsers and what answers carry
        "tokenizer_path",
        "tokenizer_mode",
        "tokenizer_backend",
        "skip_tokenizer_init",
        "enable_dynamic_batch_tokenizer",
        "dynamic_batch_tokenizer_batch_size",
        "dynamic_batch_tokenizer_batch_timeout",
        "enable_tokenizer_batch_encode",
        "disable_tokenizer_batch_decode",
        "chat_template",
        "trust_request_chat_template",
        "hf_chat_template_name",
        "completion_template",
        "default_chat_template_kwargs",
        "reasoning_parser",
        "enable_strict_thinking",
        "tool_call_parser",
        "tool_server",
        "file_storage_path",
        "enable_response_store",
        "enable_cache_report",
        "return_input_ids",
        "return_output_ids",
        "sampling_defaults",
        "sampling_mask_max_tokens",
        "allow_auto_truncate",
        "stream_interval",
        "batch_notify_size",
        "stream_response_default_include_usage",
        "incremental_streaming_output",
        "constrained_json_whitespace_pattern",
        "constrained_json_disable_any_whitespace",
        "constrained_json_max_whitespace_cnt",
        "disable_outlines_disk_cache",
        "enable_custom_logit_processor",
        "enable_return_hidden_states",
        "return_hidden_states_mode",
        # logs, metrics and traces
        "log_level",
        "log_level_http",
        "log_requests",
        "log_requests_level",
        "log_requests_format",
        "log_requests_target",
        "uvicorn_access_log_exclude_prefixes",
        "crash_dump_folder",
        "show_time_cost",
        "enable_metrics",
        "enable_mfu_metrics",
        "enable_metrics_for_all_schedulers",
        "load_snapshot_publish_interval",
        "load_publish_endpoint",
        "tokenizer_metrics_custom_labels_header",
        "tokenizer_metrics_allowed_custom_labels",
        "extra_metric_labels",
        "bucket_time_to_first_token",
        "bucket_inter_token_latency",
        "bucket_e2e_request_latency",
        "prompt_tokens_buckets",
        "generation_tokens_buckets",
        "decode_log_interval",
        "enable_request_time_stats_logging",
        "enable_forward_pass_metrics",
        "forward_pass_metrics_worker_id",
        "forward_pass_metrics_ipc_name",
        "enable_trace",
        "trace_modules",
        "otlp_traces_endpoint",
        "otlp_service_name",
        "export_metrics_to_file",
        "export_metrics_to_file_dir",
        "stat_loggers",
    }
)
"""Options that may have any value."""


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value is None or value in values


def _without_custom_params(text: Any) -> bool:
    """Whether default sampling parameters leave ``custom_params`` alone, which is checked in requests only."""
    try:
        given = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return False
    return isinstance(given, dict) and "custom_params" not in given


# Kernels that read plain multi-head KV, one row per slot, from SGLang's pool.
_plain_attention = _one_of(
    "triton", "torch_native", "flex_attention", "fa3", "fa4", "flashinfer", "trtllm_mha", "aiter", "intel_amx"
)

ALLOWED_VALUES: dict[str, Callable[[Any], bool]] = {
    "device": _one_of("cuda", "cpu"),
    "model_impl": _one_of("auto", "sglang"),
    "attention_backend": _plain_attention,
    "prefill_attention_backend": _plain_attention,
    "decode_attention_backend": _plain_attention,
    "sampling_backend": _one_of("flashinfer", "pytorch"),
    "preferred_sampling_params": _without_custom_params,
}
"""Options of which some values are allowed: a predicate on the value."""

CHECKED = frozenset({"kv_cache_dtype", "enable_deterministic_inference", "rl_on_policy_target"})
"""Options that are right or wrong by the model, the device or a3's own options."""


@dataclass(frozen=True)
class Feature:
    """A part of SGLang that a3 cannot run with.

    Attributes:
        reason: completes the sentence "``--option``: ..."
        switches: options that turn it on, refused whether the user or SGLang itself set them.
        details: options that only matter once it is on, refused where the user set them.
    """

    reason: str
    switches: tuple[str, ...]
    details: tuple[str, ...] = ()


REFUSED = (
    Feature("without a radix cache there is no tree to reuse from", ("disable_radix_cache",)),
    Feature("multi-item scoring runs without a radix cache", ("enable_mis",)),
    Feature("without a KV cache there is nothing to reuse", ("prefill_only_disable_kv_cache",)),
    Feature("embedding and reward models are not supported", ("is_embedding",)),
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
    Feature("sparse attention does not read all of the KV a3 fills", ("enable_hisparse",), ("hisparse_config",)),
    Feature("streaming sessions are not supported", ("enable_streaming_session",)),
    Feature(
        "a3's passes would run with the adapters of the batch before; LoRA is not supported yet",
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
        "the model returns a tuple with it, which a3 does not take apart",
        ("enable_return_aux_hidden_states",),
        ("aux_hidden_state_capture", "return_aux_hidden_state_layer_ids"),
    ),
    Feature(
        "what a3's passes record would be returned as the request's own",
        ("enable_return_routed_experts", "enable_return_indexer_topk"),
    ),
    Feature(
        "diffusion models attend in both directions, reused KV does not",
        ("dllm_algorithm",),
        ("dllm_algorithm_config", "dllm_fdfo"),
    ),
    Feature(
        "the canary takes KV that a3 copied for corruption",
        ("kv_canary",),
        ("kv_canary_real_data", "kv_canary_sweep_interval"),
    ),
    Feature(
        "multiplexed prefills bypass the step in which a3 fills their KV",
        ("enable_pdmux",),
        ("pdmux_config_path", "sm_group_num"),
    ),
    Feature(
        "it splits the batches whose KV a3 fills", ("enable_two_batch_overlap",), ("tbo_token_distribution_threshold",)
    ),
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
        "data-parallel attention is not supported; --dp-size is",
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
        "this gRPC server bypasses the tokenizer manager, so custom_params would not be checked (--grpc-port does not)",
        ("smg_grpc_mode", "grpc_mode"),
        ("smg_http_sidecar_port",),
    ),
    Feature("SGLang loads no plugins in Ray's actors", ("use_ray",)),
)
"""What a3 is known to be wrong with; ``--a3-allow`` does not lift it."""
