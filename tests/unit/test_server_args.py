"""Every option of SGLang's server is allowed, refused with a reason, or refused because its effect is unknown."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import sglang
from sglang.srt.environ import envs

from a3_sglang.config import RequestOptions, ServerOptions
from a3_sglang.integration import compat
from a3_sglang.integration.allowed_args import ALLOWED, ALLOWED_VALUES, CHECKED
from a3_sglang.integration.refused_args import REFUSED, REFUSED_VARIABLES
from a3_sglang.integration.support import server_options
from helpers.arguments import CPU, LLAMA, changed, plugins_loaded, refused, resolved, write_model
from helpers.server_args import DECIDED, DETAILS, SWITCHES, UNDECIDED

FIELDS: dict[str, list[str]] = json.loads((Path(__file__).parent / "data" / "server_args_fields.json").read_text())
"""Names of the fields of ServerArgs, by release. For a new release: ``sorted(compat.argument_defaults())``."""

INSTALLED = compat.argument_defaults()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def plain(model: str) -> Any:
    """Arguments of a plain start on a CPU."""
    with plugins_loaded():
        return resolved(model, **CPU)


@pytest.fixture(scope="module")
def config(plain: Any) -> Any:
    return compat.model_config(plain)


def another(value: Any) -> Any:
    """Another value, of about the same type; of a switch, the one that turns it on."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, (list, dict)):
        return type(value)() if value else ["changed"]
    return "changed"


# ---- the tables


def test_the_list_of_fields_is_that_of_the_installed_release():
    assert sglang.__version__ in FIELDS, "write the fields of this release to data/server_args_fields.json"
    assert sorted(INSTALLED) == FIELDS[sglang.__version__]


def test_every_supported_release_is_listed():
    assert set(FIELDS) == set(compat.SUPPORTED)


def test_no_field_is_in_two_tables():
    tables = [ALLOWED, set(ALLOWED_VALUES), CHECKED, SWITCHES, DETAILS, UNDECIDED]
    assert sum(map(len, tables)) == len(set().union(*tables))
    listed = [name for feature in REFUSED for name in (*feature.switches, *feature.details)]
    assert len(listed) == len(set(listed))


def test_every_name_in_a_table_is_a_field_of_some_release():
    assert (DECIDED | UNDECIDED) - set().union(*FIELDS.values()) == set()


def test_the_page_of_options_is_complete():
    page = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    assert [name for name in ServerOptions.model_fields if f"`--a3-{name.replace('_', '-')}`" not in page] == []
    assert [name for name in RequestOptions.model_fields if f"`{name}`" not in page] == []
    assert [feature for feature in REFUSED if f"| {feature.reason} |" not in page] == []
    assert [name for name in SWITCHES if f"{name.replace('_', '-')}`" not in page] == []


@pytest.mark.parametrize("release", FIELDS)
def test_every_field_is_decided_or_listed_as_undecided(release: str):
    assert set(FIELDS[release]) - DECIDED - UNDECIDED == set()


# ---- a plain start


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("loaded", [True, False], ids=["plugins first", "arguments first"])
def test_what_sglang_fills_in_is_not_refused(model: str, device: str, loaded: bool):
    given = CPU if device == "cpu" else {"device": "cuda"}
    if loaded:
        with plugins_loaded():
            arguments = resolved(model, **given)
    else:
        arguments = resolved(model, **given)
    filled = [name for name, default in INSTALLED.items() if compat.resolved_argument(arguments, name) != default]
    assert set(filled) - ALLOWED - set(ALLOWED_VALUES), "the point of this test: SGLang fills in others as well"
    assert refused(arguments) is None


def test_what_the_commands_start_is_not_refused(model: str):
    from a3_sglang.client import engine_arguments

    with plugins_loaded():
        assert refused(resolved(**engine_arguments(model))) is None


def test_the_decision_is_the_same_in_the_scheduler(plain: Any, config: Any):
    for arguments in (plain, changed(plain, enable_lora=True), changed(plain, strip_thinking_cache=True)):
        sent = pickle.loads(pickle.dumps(arguments))
        assert compat.given_arguments(sent) == compat.given_arguments(arguments)
        assert refused(sent, config) == refused(arguments, config)


# ---- one field changed


def test_every_allowed_field_may_change(plain: Any, config: Any):
    wrong = {}
    for name in ALLOWED & set(INSTALLED):
        if reason := refused(changed(plain, **{name: another(INSTALLED[name])}), config):
            wrong[name] = reason
    assert wrong == {}


def test_every_other_field_is_refused_by_name(plain: Any, config: Any):
    others = set(INSTALLED) - ALLOWED
    assert len(others) > 200
    for name in others:
        reason = refused(changed(plain, **{name: another(INSTALLED[name])}), config)
        assert reason is not None, name
        assert reason.partition(": ")[0].endswith(name.strip("_").replace("_", "-")), (name, reason)
        assert "\n" not in reason


def test_a_field_of_a_later_release_is_refused(plain: Any, config: Any, monkeypatch: pytest.MonkeyPatch):
    later = {**INSTALLED, "enable_something_new": False}
    monkeypatch.setattr(compat, "argument_defaults", lambda: later)
    assert refused(changed(plain, enable_something_new=False), config) is None
    reason = refused(changed(plain, enable_something_new=True), config)
    assert reason is not None
    assert "--a3-allow enable_something_new" in reason


def test_a_field_given_its_default_is_not_refused(plain: Any, config: Any):
    for name in set(INSTALLED) - ALLOWED - set(ALLOWED_VALUES) - CHECKED:
        assert refused(changed(plain, **{name: INSTALLED[name]}), config) is None, name


@pytest.mark.parametrize("name", sorted(SWITCHES & set(INSTALLED)))
def test_what_sglang_itself_switches_on_is_refused(plain: Any, config: Any, name: str):
    arguments = changed(plain, **{name: another(INSTALLED[name])})
    given = "_a3_given" if compat.overwrites_arguments() else "_raw_input"
    setattr(arguments, given, getattr(plain, given))
    reason = refused(arguments, config)
    assert reason is not None
    assert f"{name.replace('_', '-')} (set by SGLang" in reason


def test_a_switch_set_to_off_is_not_refused(plain: Any, config: Any):
    for name in SWITCHES & set(INSTALLED):
        for off in (None, False, "none"):
            assert refused(changed(plain, **{name: off}), config) is None, name


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("device", "cuda", "npu"),
        ("model_impl", "sglang", "transformers"),
        ("attention_backend", "fa3", "dsa"),
        ("prefill_attention_backend", "flashinfer", "flashmla"),
        ("decode_attention_backend", "triton", "ascend"),
        ("sampling_backend", "pytorch", "token_oracle"),
        ("preferred_sampling_params", '{"temperature": 0}', '{"custom_params": {"a3": false}}'),
        ("preferred_sampling_params", {"top_p": 0.5}, "[]"),
    ],
)
def test_fields_with_some_allowed_values(plain: Any, config: Any, name: str, right: Any, wrong: Any):
    assert refused(changed(plain, **{name: right}), config) is None
    assert f"--a3-allow {name}" in (refused(changed(plain, **{name: wrong}), config) or "")


# ---- --a3-allow


def test_allow_lifts_what_is_not_known(plain: Any, config: Any):
    for name in UNDECIDED & set(INSTALLED):
        arguments = changed(plain, **{name: another(INSTALLED[name])})
        assert refused(arguments, config, allow=name) is None, name


def test_allow_does_not_lift_what_is_known_to_be_wrong(plain: Any, config: Any):
    for name in (SWITCHES | DETAILS) & set(INSTALLED):
        arguments = changed(plain, **{name: another(INSTALLED[name])})
        assert refused(arguments, config, allow=name) == refused(arguments, config) is not None


def test_the_hint_names_all_that_is_missing(plain: Any, config: Any):
    given = {"strip_thinking_cache": True, "enable_torch_compile": True, "forward_hooks": [{}]}
    arguments = changed(plain, **given)
    reason = refused(arguments, config, allow="forward_hooks")
    assert reason is not None
    assert all("--" + name.replace("_", "-") in reason for name in ("strip_thinking_cache", "enable_torch_compile"))
    hint = reason.partition("--a3-allow ")[2]
    assert set(hint.split(",")) == set(given)
    assert refused(arguments, config, allow=hint) is None


def test_allow_takes_names_and_options(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A3_ALLOW", "forward_hooks, --strip-thinking-cache,forward_hooks")
    assert ServerOptions.from_environment().allow == ("forward_hooks", "strip_thinking_cache")


@pytest.mark.parametrize("text", ["", "forward_hooks,", "enable_nothing", "forward-hooks strip-thinking-cache"])
def test_allow_names_what_sglang_does_not_have(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv("A3_ALLOW", text)
    with pytest.raises(ValueError, match=r"^--a3-allow: SGLang has no server option '"):
        server_options()


# ---- options compared with others


@pytest.mark.parametrize(
    ("device", "options", "named"),
    [
        ("cpu", {}, "--a3-donors compiled"),
        ("cpu", {"donors": "compiled"}, "--a3-overhead"),
        ("cpu", {"donors": "compiled", "overhead": 100}, None),
        ("cpu", {"donors": "compiled", "min_saving": 0}, None),
        ("cuda", {"row_attention": "triton"}, "--a3-donors compiled"),
        ("cuda", {"donors": "compiled", "overhead": 0}, "--a3-row-attention"),
        ("cuda", {"donors": "compiled", "overhead": 0, "row_attention": "triton"}, None),
        ("cuda", {"allow": "enable_deterministic_inference"}, "--a3-donors compiled"),
    ],
)
def test_deterministic_inference(plain: Any, config: Any, device: str, options: Any, named: str | None):
    reason = refused(changed(plain, device=device, enable_deterministic_inference=True), config, **options)
    if named is None:
        assert reason is None
    else:
        assert reason is not None
        assert reason.startswith("--enable-deterministic-inference: ")
        assert named in reason


@pytest.mark.parametrize("donors", ["harvest", "compiled"])
def test_mixed_chunks(plain: Any, config: Any, donors: str):
    reason = refused(changed(plain, enable_mixed_chunk=True), config, donors=donors)
    assert (reason is None) == (donors == "harvest")
    assert reason is None or reason.startswith("--enable-mixed-chunk: ")


@pytest.mark.parametrize(("kept", "right"), [("auto", True), ("bf16", True), ("bfloat16", True), ("fp8_e4m3", False)])
def test_dtype_of_the_kv(plain: Any, config: Any, kept: str, right: bool):
    reason = refused(changed(plain, kv_cache_dtype=kept), config, allow="kv_cache_dtype")
    assert (reason is None) == right
    assert right or reason.startswith("--kv-cache-dtype: ")


@pytest.mark.parametrize("variable", REFUSED_VARIABLES)
def test_variables_that_are_refused(plain: Any, config: Any, monkeypatch: pytest.MonkeyPatch, variable: str):
    monkeypatch.setenv(variable, "1")
    # Older releases of SGLang do not read the newer variables.
    expected = f"{variable}: {REFUSED_VARIABLES[variable]}" if hasattr(envs, variable) else None
    assert refused(plain, config) == expected


# ---- as SGLang itself resolves it


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"disable_radix_cache": True}, "--disable-radix-cache: "),
        ({"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj"]}, "--enable-lora: "),
        ({"lora_paths": ["/no/such/adapter"]}, "--lora-paths: "),
        ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num: "),
        ({"kv_canary": "log"}, "--kv-canary: "),
        ({"enable_return_routed_experts": True}, "--enable-return-routed-experts: "),
        ({"smg_grpc_mode": True}, "--smg-grpc-mode: "),
        ({"use_ray": True}, "--use-ray: "),
        ({"tp_size": 2}, "--tp-size: "),
        ({"kv_cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype: "),
        ({"strip_thinking_cache": True}, "--strip-thinking-cache: not known"),
        ({"dp_size": 2}, None),
        ({"quantization": "fp8", "schedule_policy": "lpm", "enable_mixed_chunk": True}, None),
        ({"enable_metrics": True, "log_level": "debug", "page_size": 16, "chunked_prefill_size": 4096}, None),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_options_given_to_sglang(model: str, given: dict[str, Any], named: str | None):
    with plugins_loaded():
        reason = refused(resolved(model, **CPU, **given))
    assert reason is None if named is None else (reason or "").startswith(named), reason


def test_a_model_that_produces_embeddings(tmp_path: Path):
    arguments = resolved(write_model(tmp_path, LLAMA), **CPU, is_embedding=True)
    assert (refused(arguments) or "").startswith("--is-embedding: ")
