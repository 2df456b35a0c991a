"""Options of SGLang's server that a3 is known to be right with, over all supported releases.

:data:`ALLOWED` options change nothing that a3 relies on; for :data:`ALLOWED_VALUES` this holds for some values only.
:mod:`a3_sglang.integration.support` compares :data:`CHECKED` options with the model or with a3's own options.
:mod:`a3_sglang.integration.refused_args` has the options that a3 is known to be wrong with. The effect of every other
option is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

ALLOWED = frozenset(
    {
        # sources of configuration and weights, which are final before a3 reads the model
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
        "disable_hybrid_swa_memory",
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
        # replicas: each has its own scheduler, pool and index
        "dp_size",
        "load_balance_method",
        # collectives between GPUs, of which a replica has one
        "disable_custom_all_reduce",
        "enable_p2p_check",
        "enable_nccl_nvls",
        "enable_mscclpp",
        "pre_warm_nccl",
        # HTTP and the native gRPC server, whose requests go through the same tokenizer manager
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
        # tokenizers, templates, parsers and the contents of answers
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
    """Whether default sampling parameters do not set ``custom_params``, which are validated in requests only."""
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
"""Options of which some values are allowed, each with a predicate on the value."""

CHECKED = frozenset({"kv_cache_dtype", "enable_deterministic_inference"})
"""Options that are right or wrong depending on the model, the device or a3's own options."""
