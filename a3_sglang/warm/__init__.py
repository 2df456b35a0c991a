"""Prefill documents ahead of time on a running server; standard library only."""

from a3_sglang.warm.prefill import (
    Document,
    Pace,
    ServerError,
    ServerInfo,
    Warmed,
    server_info,
    warm,
)

__all__ = ["Document", "Pace", "ServerError", "ServerInfo", "Warmed", "server_info", "warm"]
