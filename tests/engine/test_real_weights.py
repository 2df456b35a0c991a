"""A trained model on the engine, whose attention and drift differ from those of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from a3_sglang.client import flush
from helpers.oracle import CORRECTED, check, probe_agreement
from helpers.reference import Llama
from helpers.tolerance import DTYPE, assert_same_prefill
from helpers.traffic import Traffic, answer, parts

pytestmark = [pytest.mark.engine, pytest.mark.core]

MODEL = "model"


def test_ratio_one_is_a_full_prefill(traffic: Traffic):
    for _ in range(2):
        flush(traffic.running)
        traffic.renew()
        traffic.ask(traffic.prompt(list(range(8))), False)
        ids = traffic.prompt([6, 3, 0, 5])
        fused = traffic.ask(ids, {"ratio": 1.0, "keep": False})
        report = fused["meta_info"]["a3"]
        assert report["reason"] is None
        assert report["reused"] == 0
        assert report["recomputed"] > 64
        assert parts(report) == len(ids)
        full = traffic.ask(ids, False)
        assert full["meta_info"]["a3"]["prefix"] == report["prefix"]
        assert answer(fused)[0] == answer(full)[0]
        assert answer(fused)[1] == pytest.approx(answer(full)[1], abs=1e-3 if DTYPE is torch.float32 else 0)
        end = len(ids) - report["tail"]
        mine, theirs = traffic.kv(fused), traffic.kv(full)
        for part in "kv":
            assert_same_prefill(mine[part][:, :end], theirs[part][:, :end])


def test_fused_kv_is_the_oracles(traffic: Traffic, model: str):
    check(traffic, Llama.load(Path(model)), CORRECTED, documents=2)


def test_the_probe_picks_the_oracles_rows(traffic: Traffic, model: str):
    assert probe_agreement(traffic, Llama.load(Path(model)), documents=2) > 0.8
