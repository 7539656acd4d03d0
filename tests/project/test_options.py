"""The table of options agrees with everything that states options by hand, and with the generated C++."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import get_type_hints

import pytest
from support.paths import ROOT

import fastkd
from fastkd.call.options import OPTION_NAMES, TABLE, LossOptions, Numbers, Options
from fastkd.functional import DenseOptions, LinearOptions


def test_the_signature_of_kd_loss_has_the_table_and_its_defaults() -> None:
    parameters = inspect.signature(inspect.unwrap(fastkd.kd_loss)).parameters
    for option in TABLE:
        assert option.name in parameters, option.name
        assert parameters[option.name].default == option.default, option.name
        assert f"        {option.name}: " in (fastkd.kd_loss.__doc__ or ""), option.name


def test_typed_options_are_those_of_the_signature() -> None:
    parameters = inspect.signature(inspect.unwrap(fastkd.kd_loss)).parameters
    keywords = {name for name, value in parameters.items() if value.kind is value.KEYWORD_ONLY}
    assert set(DenseOptions.__annotations__) == keywords - {"return_parts"}
    assert set(OPTION_NAMES) <= set(LossOptions.__annotations__)
    fused = inspect.signature(inspect.unwrap(fastkd.fused_linear_kd_loss)).parameters
    own = {name for name, value in fused.items() if value.kind is value.KEYWORD_ONLY}
    assert set(LinearOptions.__annotations__) == (own - {"return_parts"}) | set(
        LossOptions.__annotations__
    )


def test_options_have_the_table_and_its_defaults() -> None:
    fields = Options._fields
    assert fields[1 : 1 + len(TABLE)] == OPTION_NAMES
    default = Options(fastkd.forward_kl())
    types = get_type_hints(Options)
    for option in TABLE:
        value = getattr(default, option.name)
        assert type(value) is types[option.name], option.name
        if option.name != "teacher_temperature":  # None: the student's
            assert value == option.check(option.name, option.default), option.name


def test_stand_ins_pass_the_checks() -> None:
    for option in TABLE:
        if option.stand_in is not None:
            option.check(option.name, option.stand_in)


def test_numbers_of_a_graph_come_back() -> None:
    numbers = Numbers.of(alpha=0.5, softcap=None, ignore_index=7, num_items=3, taken_at=2.0)
    assert numbers.scalars["teacher_temperature"] == numbers.scalars["temperature"]
    assert Numbers.from_flat(list(numbers.flat())) == numbers
    with pytest.raises(
        TypeError, match="an option must be one of alpha, temperature, .*; got 'alhpa'"
    ):
        Numbers.of(alhpa=0.5)


def test_the_generated_headers_are_current() -> None:
    check = [sys.executable, str(ROOT / "csrc" / "generate.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("extension", ["_C", "_cuda"])
def test_an_extension_of_another_table_is_an_obstacle(
    extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(f"fastkd.{extension}", reason="the extension is not built")
    from fastkd.backends import registry

    monkeypatch.setattr(module, "OPTION_NAMES", "alpha temperature", raising=False)
    found = registry._native_obstacle(f"fastkd.{extension}", None, "")
    assert found is not None
    assert "another table of options" in found.reason
