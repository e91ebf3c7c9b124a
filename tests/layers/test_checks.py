import pytest
import torch

from eri.layers import Linear, ReLU, check_same_device
from eri.layers.checks import check_divides


def test_c076_two_devices_are_both_named() -> None:
    layer = Linear(3, 4)
    layer.bias = torch.nn.Parameter(torch.zeros(4, device="meta"))
    with pytest.raises(RuntimeError, match="weight is on cpu, but bias is on meta"):
        check_same_device(layer)


def test_c076_inputs_are_looked_at_too() -> None:
    layer = Linear(3, 4)
    x = torch.zeros(3)
    assert check_same_device(layer, x) == torch.device("cpu")
    with pytest.raises(RuntimeError, match="weight is on cpu, but input 1 is on meta"):
        check_same_device(layer, x, x.to("meta"))
    with pytest.raises(ValueError, match="has a device"):
        check_same_device(ReLU())


@pytest.mark.gpu
def test_c076_a_forward_pass_across_devices_names_both() -> None:
    with pytest.raises(RuntimeError, match=r"cuda:0.*cpu|cpu.*cuda:0"):
        Linear(3, 4, device="cuda")(torch.zeros(3))


def test_a_divisor_of_zero_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="ReLU: width = 8 is not divisible by heads = 0"):
        check_divides(ReLU(), "heads", 0, "width", 8)
