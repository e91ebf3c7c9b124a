from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from eri.models.tower import TextTower
from eri.models.windows import Marks
from eri.models.words import PromptReader, States

END = 9


@pytest.fixture(scope="module")
def model() -> CLIPTextModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    return CLIPTextModel(
        CLIPTextConfig(**sizes, num_attention_heads=2, vocab_size=12, max_position_embeddings=6)
    ).requires_grad_(False)


def tower(
    model: CLIPTextModel,
    depth: int,
    normed: bool,
    projection: torch.nn.Linear | None = None,
) -> TextTower:
    tokenizer: Any = None  # the windows are given
    reader = PromptReader(tokenizer, Marks(8, END, 0), length=6, joined="ui")
    return TextTower(model, projection, reader=reader, states=States(depth, normed))


IDS = torch.tensor([[8, 1, 2, 9, 0, 0], [8, 11, 9, 3, 9, 0], [8, 9, 0, 0, 0, 0]])


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("normed", [True, False])
def test_states(model: CLIPTextModel, depth: int, normed: bool) -> None:
    expected = model(IDS, output_hidden_states=True).hidden_states[-depth]
    if normed:
        expected = model.final_layer_norm(expected)
    states, pooled = tower(model, depth, normed)(IDS)
    assert pooled is None
    torch.testing.assert_close(states, expected, rtol=0, atol=0)
    torch.testing.assert_close(tower(model, depth, not normed)(IDS)[0].shape, expected.shape)
    assert not torch.equal(tower(model, depth, not normed)(IDS)[0], expected)


def test_pooled_is_the_first_end_after_the_norm(model: CLIPTextModel) -> None:
    projection = torch.nn.Linear(16, 4, bias=False).requires_grad_(False)
    _, pooled = tower(model, 2, False, projection)(IDS)
    last = model(IDS).last_hidden_state
    expected = torch.stack([last[0, 3], last[1, 2], last[2, 1]]) @ projection.weight.T
    torch.testing.assert_close(pooled, expected)
    # in the second row a token's id is higher than that of the end, as embeddings' tokens have
    highest = last[torch.arange(3), IDS.argmax(dim=1)] @ projection.weight.T
    assert not torch.allclose(pooled[1], highest[1])
