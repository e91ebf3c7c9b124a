"""Models from the Hub: which files are taken, what the cache does without a network, refusals."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eri.errors import DiskError, ModelError
from eri.formats.diffusers_folder import weights
from eri.run import hub
from eri.run.hub import HubId
from tests.stub_hub import COMMIT, TOKEN, StubHub, stub_hub

LATER = "decade" + "0" * 34
MAIN = HubId("owner/name")
PINNED = HubId("owner/name", COMMIT)
UNET = "unet/diffusion_pytorch_model"
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": [None, None],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
NEEDED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    f"{UNET}.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
OTHERS = [
    ".gitattributes",
    "README.md",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.fp16.safetensors",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.onnx",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/tokenizer.py",
    "unet/deeper/config.json",
    f"{UNET}.bin",
    f"{UNET}.ema.safetensors",
    f"{UNET}.fp16.bin",
    f"{UNET}.non_ema.safetensors",
    f"{UNET}.safetensors",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "vae/diffusion_pytorch_model.fp16.bin",
]


def model() -> dict[str, bytes]:
    """A repository as the large ones are: each file in every format."""
    files = {name: f"the content of {name}".encode() * 9 for name in [*NEEDED, *OTHERS]}
    return files | {"model_index.json": json.dumps(INDEX).encode()}


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    with stub_hub(model(), tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def said() -> list[str]:
    return []


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ids


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("owner/name", "owner/name", "main"),
        ("o/n", "o/n", "main"),
        ("stabilityai/sdxl-base_1.0", "stabilityai/sdxl-base_1.0", "main"),
        ("owner/name@v1.0", "owner/name", "v1.0"),
        ("owner/name@refs/pr/1", "owner/name", "refs/pr/1"),
        (f"owner/name@{COMMIT}", "owner/name", COMMIT),
        ("owner/name@fünf", "owner/name", "fünf"),
        ("owner/name@a@b", "owner/name", "a@b"),
    ],
)
def test_a_hub_id(text: str, repo: str, revision: str) -> None:
    found = hub.parse(text)
    assert found == HubId(repo, revision)
    assert str(found) == f"{repo}@{revision}"
    assert HubId(repo).name == repo.split("/")[1]


@pytest.mark.parametrize(
    "text",
    [
        *("", "demo", "name@v1", "/", "owner/", "/name", "a/b/c", "./name", "../name", "~/name"),
        *("/abs", "-o/name", "owner/-name", "owner/name-", "owner/na--me", "owner/na..me"),
        *("owner/name.git", "models/x.safetensors", "models/x.ckpt", "owner\\name", "owner/na me"),
        *("öwner/name", "owner/name\n", "https://x/owner/name", "o/" + "n" * 97, "C:/name"),
    ],
)
def test_no_hub_id(text: str) -> None:
    assert hub.parse(text) is None


@pytest.mark.parametrize(
    "revision",
    [
        *("", " ", "a b", "a\n", "a\x1b", "a\u202eb", "\ud800", "/etc/passwd", "..", "../x"),
        *("a/../b", "a/./b"),
        *(".hidden", "a/.b", "a/", "a//b", "a.lock", "a.", "a~1", "a^", "a:b", "a?", "a*", "a[b"),
        *("a\\b", "a@{1}", "x" * 201),
    ],
)  # fmt: skip
def test_no_revision(revision: str) -> None:
    assert hub.parse(f"owner/name@{revision}") is None


# what is downloaded


def test_only_the_files_that_are_needed(stub: StubHub, said: list[str], tmp_path: Path) -> None:
    folder = hub.download(MAIN, said.append)
    assert stub.fetched() == NEEDED
    assert files_in(folder) == NEEDED
    assert all((folder / name).read_bytes() == stub.files[name] for name in NEEDED)
    assert folder == tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    assert said == [
        f"downloading owner/name@main: 0.00 GB into {tmp_path / 'hub'}",
        "its fp16 weights are taken: half of the download",
    ]


def test_the_second_text_encoder_of_sdxl(stub: StubHub, said: list[str]) -> None:
    second = [
        "text_encoder_2/config.json",
        "text_encoder_2/model.fp16.safetensors",
        "tokenizer_2/merges.txt",
        "tokenizer_2/vocab.json",
    ]
    stub.files |= dict.fromkeys(second, b"two")
    hub.download(MAIN, said.append)
    assert stub.fetched() == NEEDED  # model_index.json says that the model does without
    named = INDEX | {"text_encoder_2": ["a", "b"], "tokenizer_2": ["a", "b"]}
    stub.files["model_index.json"] = json.dumps(named).encode()
    stub.commit = LATER
    folder = hub.download(MAIN, said.append)
    assert files_in(folder) == sorted([*NEEDED, *second])


def test_an_index_that_passes_parts_over(stub: StubHub, said: list[str]) -> None:
    stub.files["model_index.json"] = b'{"unet": ["diffusers", "UNet2DConditionModel"]}'
    assert files_in(hub.download(MAIN, said.append)) == NEEDED


def test_full_weights_where_there_is_no_fp16(stub: StubHub, said: list[str]) -> None:
    for name in ("text_encoder/model.fp16.safetensors", f"{UNET}.fp16.safetensors"):
        del stub.files[name]
    folder = hub.download(MAIN, said.append)
    assert weights(folder / "unet") == [folder / f"{UNET}.safetensors"]
    assert not any("fp16" in line for line in said)
    assert not any("fp16" in name for name in stub.fetched())


def put_shards(files: dict[str, bytes], index: str, variant: str) -> list[str]:
    shards = [f"diffusion_pytorch_model{variant}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    files[f"unet/{index}"] = json.dumps({"weight_map": dict(enumerate(shards * 2))}).encode()
    files |= {f"unet/{shard}": shard.encode() for shard in shards}
    return [f"unet/{name}" for name in (*shards, index)]


FULL_INDEX = "diffusion_pytorch_model.safetensors.index.json"
FP16_INDEX = "diffusion_pytorch_model.safetensors.index.fp16.json"


def test_the_shards_that_the_index_names(stub: StubHub, said: list[str]) -> None:
    full = put_shards(stub.files, FULL_INDEX, "")
    half = put_shards(stub.files, FP16_INDEX, ".fp16")
    for name in (f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"):
        del stub.files[name]
    folder = hub.download(MAIN, said.append)
    assert set(half) <= set(stub.fetched())
    assert not set(full) & set(stub.fetched())
    assert weights(folder / "unet") == [folder / name for name in half[:2]]
    assert "its fp16 weights are taken: half of the download" in said


def test_a_set_that_another_program_has_begun_is_completed(stub: StubHub, said: list[str]) -> None:
    full = put_shards(stub.files, FULL_INDEX, "")
    folder = hub.download(MAIN, said.append)
    (folder / "unet" / FULL_INDEX).write_bytes(stub.files[f"unet/{FULL_INDEX}"])
    with pytest.raises(ModelError, match="2 of 2 weight files are missing"):
        weights(folder / "unet")
    stub.asked.clear()
    assert hub.download(MAIN, said.append) == folder
    assert stub.fetched() == full[:2]
    assert weights(folder / "unet") == [folder / name for name in full[:2]]


def test_the_second_call_asks_for_the_commit_only(stub: StubHub, said: list[str]) -> None:
    folder = hub.download(MAIN, said.append)
    stub.asked.clear()
    said.clear()
    assert hub.download(MAIN, said.append) == folder
    assert stub.asked == ["GET /api/models/owner/name/revision/main"]
    assert hub.download(PINNED, said.append) == folder
    assert len(stub.asked) == 1
    assert said == []


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", COMMIT])
def test_a_tag_a_pull_request_a_commit(stub: StubHub, said: list[str], revision: str) -> None:
    folder = hub.download(HubId("owner/name", revision), said.append)
    assert folder.name == COMMIT
    stub.stop()
    assert hub.download(HubId("owner/name", revision), said.append) == folder


def test_a_new_commit_is_downloaded_as_far_as_it_differs(stub: StubHub, said: list[str]) -> None:
    hub.download(MAIN, said.append)
    stub.commit = LATER
    stub.files[f"{UNET}.fp16.safetensors"] = b"better"
    stub.asked.clear()
    folder = hub.download(MAIN, said.append)
    assert folder.name == LATER
    assert (folder / f"{UNET}.fp16.safetensors").read_bytes() == b"better"
    assert stub.fetched() == [f"{UNET}.fp16.safetensors"]


def test_a_damaged_copy_is_fetched_anew(stub: StubHub, said: list[str]) -> None:
    folder = hub.download(MAIN, said.append)
    unet = folder / f"{UNET}.fp16.safetensors"
    unet.resolve().write_bytes(b"short")
    hub.download(MAIN, said.append)
    assert unet.read_bytes() == stub.files[f"{UNET}.fp16.safetensors"]


# without a network


def test_offline_from_the_cache(
    stub: StubHub, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.download(MAIN, said.append)
    said.clear()
    stub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.download(MAIN, said.append) == folder
    assert stub.asked == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    stub.stop()
    assert hub.download(MAIN, said.append) == folder
    assert said == [
        "owner/name@main: HF_HUB_OFFLINE is set; the copy in the cache is used",
        "owner/name@main: 127.0.0.1 cannot be reached; the copy in the cache is used",
    ]


def test_a_busy_hub_is_as_good_as_none(stub: StubHub, said: list[str]) -> None:
    folder = hub.download(MAIN, said.append)
    stub.refuse = (503, {})
    assert hub.download(MAIN, said.append) == folder
    assert "answers with error 503; the copy in the cache is used" in said[-1]


@pytest.mark.parametrize("way", ["offline", "stopped"])
def test_neither_network_nor_copy(
    stub: StubHub, said: list[str], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stub.stop()
    with pytest.raises(ModelError, match="the cache has no copy of this model") as caught:
        hub.download(MAIN, said.append)
    assert caught.value.where == "owner/name@main"
    assert caught.value.hint
    assert said == []


@pytest.mark.parametrize(
    ("lost", "problem"),
    [
        (f"{UNET}.fp16.safetensors", "unet: there are no weights"),
        ("vae/config.json", "vae: config.json is missing"),
        ("scheduler/scheduler_config.json", "scheduler: scheduler_config.json is missing"),
        ("tokenizer/merges.txt", "tokenizer: neither"),
        ("model_index.json", "model_index.json is missing"),
    ],
)
def test_an_incomplete_copy_is_not_used(
    stub: StubHub, said: list[str], lost: str, problem: str
) -> None:
    for hub_id in (MAIN, PINNED):
        (hub.download(hub_id, said.append) / lost).unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_HUB_OFFLINE", "1")
            with pytest.raises(ModelError, match="no complete copy") as caught:
                hub.download(hub_id, said.append)
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].startswith(problem)


# downloads that break off


def test_a_download_that_breaks_off_once_goes_on(stub: StubHub, said: list[str]) -> None:
    name = f"{UNET}.fp16.safetensors"
    stub.cut[name] = 1
    folder = hub.download(MAIN, said.append)
    assert (folder / name).read_bytes() == stub.files[name]
    assert stub.asked.count(f"GET /owner/name/resolve/{COMMIT}/{name}") == 2


def test_half_a_file_is_never_taken_for_a_whole(
    stub: StubHub, said: list[str], tmp_path: Path
) -> None:
    name = f"{UNET}.fp16.safetensors"
    stub.cut[name] = 1000
    for hub_id in (MAIN, PINNED):
        with pytest.raises(ModelError, match=r"the cache has no (complete )?copy of this model"):
            hub.download(hub_id, said.append)
    storage = tmp_path / "hub" / "models--owner--name"
    assert not (storage / "snapshots" / COMMIT / name).exists()
    assert not list((storage / "blobs").glob("*.incomplete"))
    assert not (storage / "refs").exists()
    stub.cut.clear()
    stub.asked.clear()
    folder = hub.download(MAIN, said.append)
    assert (folder / name).read_bytes() == stub.files[name]
    assert stub.fetched() == [name]  # what had arrived is kept


def test_a_broken_update_leaves_the_older_copy_in_use(stub: StubHub, said: list[str]) -> None:
    folder = hub.download(MAIN, said.append)
    stub.commit = LATER
    stub.files[f"{UNET}.fp16.safetensors"] = b"better"
    stub.cut[f"{UNET}.fp16.safetensors"] = 1000
    assert hub.download(MAIN, said.append) == folder
    assert said[-1].endswith("the copy in the cache is used")
    stub.stop()
    assert hub.download(MAIN, said.append) == folder


def test_a_file_that_lies_about_its_size(stub: StubHub, said: list[str]) -> None:
    listing = stub.listing()
    next(f for f in listing["siblings"] if f["rfilename"] == "unet/config.json")["size"] = 5
    stub.page = json.dumps(listing).encode()
    with pytest.raises(ModelError, match=r"unet/config\.json does not arrive with its 5 bytes"):
        hub.download(MAIN, said.append)


# the disk


def test_too_little_space_is_told_before_the_weights(
    stub: StubHub, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    monkeypatch.setattr("huggingface_hub.file_download._check_disk_space", lambda *given: None)
    with pytest.raises(DiskError, match="are needed and"):
        hub.download(MAIN, said.append)
    assert not any(name.endswith(".safetensors") for name in stub.fetched())
    assert said == []


def test_a_cache_that_may_not_be_written(stub: StubHub, said: list[str], tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file")
    with pytest.raises(DiskError) as caught:
        hub.download(MAIN, said.append)
    assert caught.value.where is not None
    assert caught.value.where.startswith(str(tmp_path / "hub"))


# repositories of another kind


def refusal(stub: StubHub, files: dict[str, bytes]) -> ModelError:
    """How a repository with these files is refused; nothing of it is written but small files."""
    stub.files = files
    with pytest.raises(ModelError) as caught:
        hub.download(HubId("owner/name", "v1.0"), pytest.fail)
    assert caught.value.where == "owner/name@v1.0"
    assert caught.value.hint
    assert not any(name.endswith((".safetensors", ".bin", ".ckpt")) for name in stub.fetched())
    return caught.value


def test_single_files_are_listed(stub: StubHub) -> None:
    singles = [f"xl-{n}.safetensors" for n in range(7)]
    error = refusal(
        stub, dict.fromkeys(["README.md", "x.ckpt", "vae/x.safetensors", *singles], b"")
    )
    assert "single files" in error.what
    assert error.problems == (*singles[:5], "and 2 more")
    assert "`hf download owner/name FILE --revision v1.0 --local-dir .`" in str(error.hint)


@pytest.mark.parametrize("name", ["model.ckpt", "pytorch_model.bin", "a.pt"])
def test_only_pickles_at_the_top(stub: StubHub, name: str) -> None:
    error = refusal(stub, {name: b"", "README.md": b""})
    assert "pickles, which can run code" in error.what
    assert error.problems == (name,)
    assert "safetensors" in str(error.hint)


def test_only_pickles_in_a_part(stub: StubHub) -> None:
    files = {name: c for name, c in model().items() if not name.startswith("vae/")}
    files |= {"vae/config.json": b"{}", "vae/diffusion_pytorch_model.bin": b""}
    error = refusal(stub, files)
    assert "pickles" in error.what
    assert error.problems == ("vae/diffusion_pytorch_model.bin",)


def test_no_weights_in_a_part(stub: StubHub) -> None:
    files = {name: content for name, content in model().items() if not name.startswith("vae/")}
    assert "no weights of vae" in refusal(stub, files).what


def test_nothing_at_all(stub: StubHub) -> None:
    assert "no model_index.json and no .safetensors" in refusal(stub, {"README.md": b""}).what


def test_a_model_without_a_unet(stub: StubHub) -> None:
    index = {"_class_name": "Flux\x1bPipeline", "transformer": ["a", "b"], "vae": ["a", "b"]}
    error = refusal(stub, {"model_index.json": json.dumps(index).encode()})
    assert error.what == "a Flux\\x1bPipeline has no U-Net"


@pytest.mark.parametrize("index", [b"<html>", b"[]", b'{"unet": 7}', b'{"unet": []}'])
def test_a_damaged_index(stub: StubHub, index: bytes) -> None:
    stub.files["model_index.json"] = index
    with pytest.raises(ModelError, match=r"not a JSON file|has no U-Net"):
        hub.download(MAIN, pytest.fail)


def test_a_repository_that_lacks_small_files(stub: StubHub) -> None:
    files = model()
    del files["unet/config.json"], files["scheduler/scheduler_config.json"]
    error = refusal(stub, files)
    assert error.problems == ("scheduler/scheduler_config.json", "unet/config.json")


def test_a_repository_without_a_scheduler(stub: StubHub) -> None:
    files = {name: c for name, c in model().items() if not name.startswith("scheduler")}
    files["model_index.json"] = b'{"unet": ["diffusers", "UNet2DConditionModel"]}'
    assert refusal(stub, files).problems == ("scheduler/scheduler_config.json",)


def test_a_tokenizer_without_words(stub: StubHub) -> None:
    del stub.files["tokenizer/vocab.json"]
    with pytest.raises(ModelError, match="not complete") as caught:
        hub.download(MAIN, str)
    assert caught.value.problems[0].startswith("tokenizer: neither")


# malice

EVIL = [
    "../evil.json",
    "../../../../evil.json",
    "/tmp/evil-of-the-stub-hub.json",
    "tokenizer/../../evil.json",
    "tokenizer/../../../../../../evil.txt",
    "tokenizer/..\\evil.json",
    "tokenizer//evil.json",
    "tokenizer/C:evil.json",
    "tokenizer/\x1b[2Jevil.json",
    "tokenizer/evil.json\n",
    "tokenizer/.hidden.json",
    "unet/../evil.json",
    None,
    7,
]


def test_evil_names_are_never_asked_for(stub: StubHub, said: list[str], tmp_path: Path) -> None:
    stub.names = EVIL
    before = {path for path in tmp_path.parent.rglob("*") if "hub" not in path.parts}
    folder = hub.download(MAIN, said.append)
    assert files_in(folder) == NEEDED
    assert stub.fetched() == NEEDED
    assert {path for path in tmp_path.parent.rglob("*") if "hub" not in path.parts} == before


@pytest.mark.parametrize("shard", ["../../evil.safetensors", "/evil.safetensors", "evil.bin", 7])
def test_evil_shards_are_refused(stub: StubHub, shard: Any) -> None:
    put_shards(stub.files, FULL_INDEX, "")
    for name in (f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"):
        del stub.files[name]
    stub.files[f"unet/{FULL_INDEX}"] = json.dumps({"weight_map": {"a": shard}}).encode()
    stub.names = [f"unet/{shard}"]
    with pytest.raises(ModelError, match="weight_map does not name"):
        hub.download(MAIN, pytest.fail)
    assert not any("evil" in line for line in stub.asked)


def test_shards_that_the_repository_lacks(stub: StubHub) -> None:
    shards = put_shards(stub.files, FULL_INDEX, "")
    for name in (f"{UNET}.safetensors", f"{UNET}.fp16.safetensors", shards[1]):
        del stub.files[name]
    with pytest.raises(ModelError, match="does not hold all shards") as caught:
        hub.download(MAIN, pytest.fail)
    assert caught.value.problems == (shards[1],)


# what is heard


def test_nothing_is_printed_and_no_token_leaks(
    stub: StubHub,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    name = f"{UNET}.fp16.safetensors"
    stub.cut[name] = 1
    hub.download(MAIN, said.append)
    assert stub.tokens == {f"Bearer {TOKEN}"}
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    assert not any(TOKEN in text for text in (caplog.text, *said))
    assert not any(record.name.startswith("huggingface_hub") for record in caplog.records)


def test_no_telemetry(stub: StubHub, said: list[str]) -> None:
    hub.download(MAIN, said.append)
    assert not any("torch" in str(agent) or "agent/" in str(agent) for agent in stub.agents)
    assert all(line.startswith(("GET /api/models/", "GET /o", "HEAD /o")) for line in stub.asked)
