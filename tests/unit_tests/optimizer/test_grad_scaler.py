import pytest

from megatron.core.optimizer import ConstantGradScaler, DynamicGradScaler


def dynamic(**changes: float) -> DynamicGradScaler:
    settings = {"initial_scale": 16.0, "min_scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5}
    return DynamicGradScaler(**{**settings, "growth_interval": 3, "hysteresis": 2, **changes})


def test_sequence_of_overflows_and_clean_steps() -> None:
    scaler = dynamic()
    sequence = [(True, 16), (True, 8), (True, 4), (False, 4), (False, 4), (True, 2), (True, 2)]
    sequence += [(False, 2), (False, 2), (False, 4), (True, 4), (True, 2)]  # growth renews the hysteresis
    for found_inf, scale in sequence:
        scaler.update(found_inf)
        assert scaler.scale.item() == scale
        assert scaler.inv_scale.item() == 1 / scale


def test_state_continues_the_sequence() -> None:
    scaler, other = dynamic(), dynamic()
    for found_inf in (True, False, False):
        scaler.update(found_inf)
    state = scaler.state_dict()
    assert set(state) == {"scale", "growth_tracker", "hysteresis_tracker"}
    other.load_state_dict(state)
    for found_inf in (False, True, True):
        scaler.update(found_inf)
        other.update(found_inf)
        assert scaler.scale.item() == other.scale.item()
    assert scaler.scale.item() == 16.0


def test_constant_scale() -> None:
    scaler = ConstantGradScaler(8.0)
    scaler.update(True)
    scaler.load_state_dict(scaler.state_dict())
    assert scaler.scale.item() == 8.0 and scaler.state_dict() == {}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"initial_scale": 0.0}, "loss scale"),
        ({"min_scale": 32.0}, "min_scale"),
        ({"growth_factor": 1.0}, "growth_factor"),
        ({"backoff_factor": 1.0}, "backoff_factor"),
        ({"hysteresis": 0}, "hysteresis"),
    ],
)
def test_bad_values(changes: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        dynamic(**changes)
