from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eri.models import load_text
from tests.tiny import WORDS


def test_states_are_those_of_transformers(sd15: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    prompts = [" ".join(WORDS), "", "a red apple"]
    model = CLIPTextModel.from_pretrained(sd15 / "text_encoder")
    ids = CLIPTokenizer.from_pretrained(sd15 / "tokenizer")(
        prompts, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    context, pooled = load_text(sd15).encode(prompts)
    assert context.shape == (3, 77, 32)
    assert pooled is None
    torch.testing.assert_close(context, expected)
    assert not torch.allclose(context[0], context[1])


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_files_with_and_without_the_inner_name_are_read(
    sd15: Path, tmp_path: Path, prefix: str
) -> None:
    import shutil

    folder = shutil.copytree(sd15, tmp_path / "model")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    plain = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    written = {prefix + name: tensor for name, tensor in plain.items()}
    written[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(written, path)
    torch.testing.assert_close(load_text(folder).encode(["red"]), load_text(sd15).encode(["red"]))


def test_what_is_cut_off_is_counted(sd15: Path) -> None:
    text = load_text(sd15)
    assert text.tokens_lost("a " * 75) == 0
    assert text.tokens_lost("a " * 80) == 5
    long, cut = text.encode(["a " * 80])[0], text.encode(["a " * 75])[0]
    torch.testing.assert_close(long, cut)
