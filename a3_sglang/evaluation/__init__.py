"""How far answers over reused KV are from the full prefill's."""
