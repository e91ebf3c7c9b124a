import pickle
from dataclasses import fields

import pytest
import torch

from eri.run.micro_batch import TENSORS, Packed, Sample, SampleBatch

BATCH = SampleBatch(
    [
        Sample("plain", torch.randn(4, 3, 5), torch.rand(4, 3, 5), torch.randn(7, 3).bfloat16()),
        Sample(
            "all",
            torch.randn(4, 3, 5),
            torch.rand(4, 3, 5),
            torch.randn(14, 3).half()[::2],  # not contiguous
            pooled=torch.randn(5),
            time_ids=torch.arange(6.0),
            mask=torch.rand(1, 3, 5),
            unmasked_weight=0.25,
            weight=3.0,
        ),
    ],
    range(20, 22),
)


def assert_same(one: SampleBatch, other: SampleBatch) -> None:
    assert list(one.numbers) == list(other.numbers)
    for mine, theirs in zip(one.samples, other.samples, strict=True):
        for field in fields(Sample):
            value, expected = getattr(mine, field.name), getattr(theirs, field.name)
            if isinstance(expected, torch.Tensor):
                assert value.dtype == expected.dtype
                assert torch.equal(value.cpu(), expected)
            else:
                assert value == expected


def test_a_packed_batch_is_what_it_was_and_one_piece() -> None:
    packed = Packed.of(BATCH)
    assert_same(packed.unpack(), BATCH)
    pointers = {
        getattr(sample, name).untyped_storage().data_ptr()
        for sample in packed.unpack().samples
        for name in TENSORS
        if getattr(sample, name) is not None
    }
    assert pointers == {packed.block.untyped_storage().data_ptr()}


def test_its_message_is_small_however_large_the_tensors() -> None:
    large = [Sample(str(n), *torch.randn(3, 4, 128, 128)) for n in range(8)]
    message = Packed.of(SampleBatch(large, range(8)))
    without = pickle.dumps((message.places, message.batch))
    assert len(without) < 8192  # the block itself goes through shared memory


@pytest.mark.gpu
def test_it_comes_through_pinned_memory_onto_a_gpu() -> None:
    pinned = Packed.of(BATCH).pin_memory()
    assert pinned.block.is_pinned()
    there = pinned.to(torch.device("cuda"))
    assert_same(there.unpack(), BATCH)
    assert there.unpack().samples[1].context.is_cuda


def test_every_tensor_of_a_sample_travels() -> None:
    tensors = [field.name for field in fields(Sample) if "Tensor" in str(field.type)]
    assert sorted(tensors) == sorted(TENSORS)


@pytest.mark.parametrize(("size", "sizes"), [(1, [1, 1]), (2, [2]), (3, [2])])
def test_a_batch_in_parts_is_the_same_samples(size: int, sizes: list[int]) -> None:
    parts = BATCH.parts(size)
    assert [len(part) for part in parts] == sizes
    samples = [sample for part in parts for sample in part.samples]
    assert_same(SampleBatch(samples, [n for part in parts for n in part.numbers]), BATCH)
