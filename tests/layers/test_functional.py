from eri.layers import functional


def test_c045_the_five_documented_functions_are_there() -> None:
    assert set(functional.__all__) == {"relu", "gelu", "silu", "tanh", "sigmoid"}
