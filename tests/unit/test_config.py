"""Options of server and request: accepted values, and refusals that name the field."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from a3_sglang.config import ResolvedOptions, ServerOptions, env_name, resolve, resolve_or_disable

DEFAULT = ResolvedOptions(
    enabled=True, donor=False, keep=True, ratio=0.15, selector="probe", min_span=32, min_saving=1 / 3
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServerOptions.model_fields:
        monkeypatch.delenv(env_name(name), raising=False)


# ---- server


def test_server_defaults():
    expected = {"recompute_ratio": 0.15, "selector": "probe", "min_span": 32, "min_saving": 1 / 3, "donors": "harvest"}
    expected |= {"mode": "fuse", "overhead": "auto", "row_attention": "auto", "allow": (), "report": "rounded"}
    expected |= {"explain": "off", "drift": "auto"}
    assert ServerOptions.from_environment().model_dump() == expected


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("recompute_ratio", "0", 0.0),
        ("recompute_ratio", "1", 1.0),
        ("recompute_ratio", "2.5e-1", 0.25),
        ("recompute_ratio", "auto", "auto"),
        ("selector", "reuse", "reuse"),
        ("min_span", "8", 8),
        ("min_span", "64", 64),
        ("min_saving", "0.5", 0.5),
        ("overhead", "auto", "auto"),
        ("overhead", "250", 250),
        ("donors", "harvest", "harvest"),
        ("donors", "compiled", "compiled"),
        ("explain", "on", "on"),
        ("drift", "default", "default"),
        ("drift", "fitted.json", "fitted.json"),
        ("row_attention", "triton", "triton"),
    ],
)
def test_server_options_from_the_environment(monkeypatch, option, text, value):
    monkeypatch.setenv("A3_" + option.upper(), text)
    options = ServerOptions.from_environment()
    assert getattr(options, option) == value
    assert type(getattr(options, option)) is type(value)
    assert options.model_dump(exclude={option}) == ServerOptions().model_dump(exclude={option})


@pytest.mark.parametrize(
    ("option", "text"),
    [
        *[("recompute_ratio", text) for text in ("nan", "inf", "-inf", "-0.01", "1.01", "", "half", "true", "0.1,0.2")],
        *[("min_span", text) for text in ("7", "0", "-32", "32.5", "", "many", "nan", "inf")],
        *[("min_saving", text) for text in ("x", "-1", "1.5", "")],
        *[("overhead", text) for text in ("x", "-1", "1.5", "")],
        *[("selector", text) for text in ("", "Probe", "probe ", "a3\nx")],
        *[("donors", text) for text in ("", "Harvest", "nobody")],
        *[("explain", text) for text in ("", "On", "true")],
        *[("row_attention", text) for text in ("", "Triton", "fa2")],
    ],
)
def test_server_refusals_name_the_option(monkeypatch, option, text):
    monkeypatch.setenv("A3_" + option.upper(), text)
    with pytest.raises(ValueError, match="^--a3-" + option.replace("_", "-") + ": ") as caught:
        ServerOptions.from_environment()
    assert "\n" not in str(caught.value)


def test_server_selector_refusal_lists_the_choices(monkeypatch):
    monkeypatch.setenv("A3_SELECTOR", "best")
    with pytest.raises(ValueError, match="probe, a3, cacheblend, epic, prophetkv, qcfuse, random, reuse, full"):
        ServerOptions.from_environment()


def test_only_rules_that_measure_attention_support_auto(monkeypatch):
    monkeypatch.setenv("A3_RECOMPUTE_RATIO", "auto")
    monkeypatch.setenv("A3_SELECTOR", "a3")
    assert ServerOptions.from_environment().recompute_ratio == "auto"
    for selector in ("epic", "cacheblend", "random", "reuse", "full"):
        monkeypatch.setenv("A3_SELECTOR", selector)
        with pytest.raises(ValueError, match=r"^--a3-selector: .*\(probe, a3, prophetkv, qcfuse\)"):
            ServerOptions.from_environment()
        with pytest.raises(ValueError, match=r"^custom_params\.a3\.selector: .*\(probe, a3, prophetkv, qcfuse\)"):
            resolve(ServerOptions(selector=selector), {"a3": {"ratio": "auto"}})
        with pytest.raises(ValueError, match=r"^custom_params\.a3\.selector: "):
            resolve(ServerOptions(recompute_ratio="auto"), {"a3": {"selector": selector}})
    assert resolve(ServerOptions(), {"a3": {"ratio": "auto"}}).ratio == "auto"


# ---- request


@pytest.mark.parametrize("custom_params", [None, {}, {"other": 1}, {"a3": True}, {"a3": {}}, {"a3": {"ratio": None}}])
def test_without_wishes_the_server_decides(custom_params):
    assert resolve(ServerOptions(), custom_params) == DEFAULT


def test_false_turns_fusion_off():
    assert resolve(ServerOptions(), {"a3": False}) == DEFAULT.model_copy(update={"enabled": False})


@given(
    ratio=st.one_of(st.none(), st.sampled_from([0, 1]), st.floats(0, 1)),
    selector=st.sampled_from([None, "probe", "reuse"]),
    min_span=st.one_of(st.none(), st.integers(16, 10**6)),
)
def test_a_request_overrides_single_options(ratio, selector, min_span):
    server = ServerOptions(recompute_ratio=0.3, selector="reuse", min_span=16, min_saving=0.9)
    wishes = {"ratio": ratio, "selector": selector, "min_span": min_span}
    options = resolve(server, {"a3": {name: wish for name, wish in wishes.items() if wish is not None}})
    assert options == resolve(server, {"a3": wishes})
    assert options.enabled
    assert options.ratio == (0.3 if ratio is None else ratio)
    assert isinstance(options.ratio, float)
    assert options.selector == (selector or "reuse")
    assert options.min_span == (min_span or 16)
    assert options.min_saving == 0.9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("ratio", value) for value in (True, False, "0.5", "", [0.5], {}, -1e-9, 1.0000001, 2, -1, 10**400)],
        *[("ratio", float(text)) for text in ("nan", "inf", "-inf")],
        *[("selector", value) for value in ("", "Probe", "no such", 3, True, ["probe"], "x" * 10_000, "a\nb")],
        *[("min_span", value) for value in (31, 0, -1, True, 64.0, 64.5, "64", float("nan"), float("inf"), [64])],
        *[("donor", value) for value in (1, "true", None, [])],
        *[("explain", value) for value in (1, "true", None, [], True)],
        *[("question", value) for value in ([5, 5], [-1, 4], [9, 3], [1], [1, 2, 3], [0.0, 4], "0-4", [True, 4], 7)],
        *[("min_saving", 1), ("recompute_ratio", 0.5), ("Ratio", 0.5), ("enabled", True)],
    ],
)
def test_request_refusals_name_the_field(field, value):
    with pytest.raises(ValueError, match=rf"^custom_params\.a3\.{field}: ") as caught:
        resolve(ServerOptions(), {"a3": {field: value}})
    assert not isinstance(caught.value, ValidationError)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 10_000, 7, "rätio ratio"])
def test_odd_field_names_stay_on_one_short_line(name):
    with pytest.raises(ValueError, match=r"^custom_params\.a3\.") as caught:
        resolve(ServerOptions(), {"a3": {name: 1}})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_request_can_be_a_donor():
    assert resolve(ServerOptions(), {"a3": {"donor": True}}) == DEFAULT.model_copy(update={"donor": True})


def test_a_request_can_say_where_its_question_is():
    options = resolve(ServerOptions(), {"a3": {"question": [3, 40]}})
    assert options == DEFAULT.model_copy(update={"question": (3, 40)})


def test_only_the_server_can_enable_explain():
    asked = {"a3": {"explain": True}}
    assert resolve(ServerOptions(explain="on"), asked) == DEFAULT.model_copy(update={"explain": True})
    assert not resolve(ServerOptions(explain="on"), {"a3": {"ratio": 0.15}}).explain
    with pytest.raises(ValueError, match=r"^custom_params\.a3\.explain: .*--a3-explain on"):
        resolve(ServerOptions(), asked)
    lenient = resolve_or_disable(ServerOptions(), asked)
    assert not lenient.valid
    assert not lenient.explain


def test_the_refusal_of_an_unknown_field_lists_the_known_ones():
    with pytest.raises(ValueError, match="ratio, selector, min_span, donor"):
        resolve(ServerOptions(), {"a3": {"budget": 1}})


@pytest.mark.parametrize("value", [None, 0, 1, 0.15, "on", [], ["ratio"]])
def test_an_a3_value_of_another_type_is_refused(value):
    with pytest.raises(ValueError, match=r"^custom_params\.a3: must be true, false or an object"):
        resolve(ServerOptions(), {"a3": value})


@given(server=st.integers(8, 1000), wish=st.integers(-5, 2000))
def test_min_span_may_only_rise(server, wish):
    options = ServerOptions(min_span=server)
    if wish >= server:
        assert resolve(options, {"a3": {"min_span": wish}}).min_span == wish
    else:
        with pytest.raises(ValueError, match=rf"^custom_params\.a3\.min_span: must be at least {server},"):
            resolve(options, {"a3": {"min_span": wish}})


def test_one_bad_field_refuses_all():
    with pytest.raises(ValueError, match=r"^custom_params\.a3\.min_span: "):
        resolve(ServerOptions(), {"a3": {"ratio": 0.5, "min_span": "x"}})
