"""A pair knows its rank."""

import torch

from eri.formats.lora_pair import LoRAPair


def test_rank_is_the_width_between_the_matrices() -> None:
    assert LoRAPair(down=torch.zeros(4, 10), up=torch.zeros(20, 4), alpha=1.0).rank == 4
    convolution = LoRAPair(down=torch.zeros(2, 8, 3, 3), up=torch.zeros(16, 2, 1, 1), alpha=1.0)
    assert convolution.rank == 2
