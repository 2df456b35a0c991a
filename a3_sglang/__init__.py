"""Any-position KV reuse for SGLang (A3, arXiv 2511.17560)."""
