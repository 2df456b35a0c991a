"""Modules of ``kernels/`` that have Triton kernels; imported before Triton is, so it names nothing but them."""

KERNELS = (
    "copy_rotated",
    "drift_correction",
    "drift_selection",
    "drift_weights",
    "probe_attention",
    "probe_relevance",
    "row_attention",
)
