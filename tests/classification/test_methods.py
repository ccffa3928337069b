import re

import pytest

from app.adapters._discovery import adapter_classes, options_of
from app.classification.methods import METHODS
from app.errors import InvalidFieldError

EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def test_every_adapter_is_a_method():
    assert {adapter.declaration.name for adapter in adapter_classes()} <= set(METHODS)


@EVERY_METHOD
def test_the_defaults_of_a_method_are_those_of_its_adapter(method):
    made = method.adapter(dict(method.read_options({})))
    assert type(made) is method.adapter_class
    assert vars(made) == vars(method.adapter_class())


@EVERY_METHOD
def test_options_reach_the_adapter_with_their_type(method):
    offered = options_of(method.adapter_class)
    assert offered.keys() <= method.options.keys()
    highest = {name: float(option.maximum) for name, option in offered.items()}
    made = method.adapter(dict(method.read_options(highest)))
    for name, option in offered.items():
        assert getattr(made, name) == option.maximum
        assert isinstance(getattr(made, name), int) is option.whole


@EVERY_METHOD
def test_values_outside_the_bounds_of_an_option_are_rejected(method):
    for name, option in method.options.items():
        assert option.minimum <= option.default <= option.maximum
        for value in (option.minimum, option.maximum):
            assert dict(method.read_options({name: value}))[name] == value
        beyond = [option.minimum - 1, option.maximum + 1, *([option.minimum + 0.5] if option.whole else [])]
        for value in beyond:
            with pytest.raises(InvalidFieldError, match=re.escape(f"from {option.minimum:g} to {option.maximum:g}")):
                method.read_options({name: value})


def test_the_error_for_an_unknown_option_lists_the_known_ones():
    with pytest.raises(
        InvalidFieldError, match="method 'zlap' has no such option; known: alpha, gamma, k, keep, trans"
    ):
        METHODS["zlap"].read_options({"beta": 1})
