import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptq.errors import OptionError
from mptq.model.settings.from_options import NAMES, from_options
from mptq.model.settings.settings import KINDS


@pytest.mark.parametrize(
    ("option", "settings"),
    [
        ("num_layers=3", {"num_layers": 3}),
        ("--num-layers=3", {"num_layers": 3}),
        ("rotary-base=5e5", {"rotary_base": 500000.0}),
        ("layernorm_epsilon=1e-6", {"layernorm_epsilon": 1e-6}),
        ("norm-epsilon=1e-6", {"layernorm_epsilon": 1e-6}),
        ("qk_layernorm=true", {"qk_layernorm": True}),
        ("window_size=[4095, 0]", {"window_size": [4095, 0]}),
        ("moe_layer_freq=[0, 1]", {"moe_layer_freq": [0, 1]}),
        ("mtp_num_layers=null", {"mtp_num_layers": None}),
        ("activation_func=gelu_pytorch_tanh", {"activation_func": "gelu_tanh"}),
        ("swiglu=true", {"activation_func": "silu", "gated_linear_unit": True}),
        ("squared-relu=true", {"activation_func": "squared_relu", "gated_linear_unit": False}),
        ("untie-embeddings-and-output-weights=true", {"share_embeddings_and_output_weights": False}),
        ("disable-bias-linear=true", {"add_bias_linear": False}),
        ("apply-layernorm-1p=true", {"layernorm_zero_centered_gamma": True}),
        ("num-experts=8", {"num_moe_experts": 8}),
        ("use-rope-scaling=true", {"rope_scaling": True}),
        ("hybrid-override-pattern=M*", {"hybrid_layer_pattern": "M*", "is_hybrid_model": True}),
        ("tokenizer_model=/a=b", {"tokenizer_model": "/a=b"}),
    ],
)
def test_settings_and_arguments(option, settings):
    assert from_options([option]) == settings


def test_the_last_value_of_a_key_is_used():
    assert from_options(["num_layers=3", "num-layers=4"]) == {"num_layers": 4}
    assert from_options([]) == {}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("num_layers", "write key=value"),
        ("=3", "write key=value"),
        ("num_layer=3", "did you mean num_layers?"),
        ("swigl=true", "did you mean swiglu?"),
        ("zzz=1", "unknown setting 'zzz'"),
        ("num_layers=many", "must be int, not str"),
        ("num_layers=true", "must be int, not bool"),
        ("num-experts=many", "must be int, not str"),
        ("rotary_base=high", "must be float or int, not str"),
        ("qk_layernorm=1", "must be bool, not int"),
        ("swiglu=yes please", "must be bool, not str"),
        ("untie-embeddings-and-output-weights=3", "must be bool, not int"),
        ("window_size={a: 1}", "not dict"),
        ("activation_func=tanh", "unknown activation 'tanh'"),
        ("num_layers=[1", "is not a YAML value"),
        ("num_layers=!!python/name:os.system", "is not a YAML value"),
    ],
)
def test_errors_are_one_line(option, message):
    with pytest.raises(OptionError) as error:
        from_options([option])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@given(st.sampled_from(NAMES), st.text(max_size=12))
def test_any_text_gives_settings_or_an_option_error(name, text):
    try:
        settings = from_options([f"{name}={text}"])
    except OptionError:
        return
    assert set(settings) <= set(KINDS)
    assert all(value is None or isinstance(value, KINDS[key]) for key, value in settings.items())
