import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from eri.errors import MemoryLimitError
from eri.models.arrange import RECOMPUTE, Recompute
from eri.models.spec import SDXL
from eri.run import memory_plan as module
from eri.run.footprint import Footprint, footprint
from eri.run.memory_plan import (
    LEAST,
    RESERVED,
    WORKSPACES,
    Batch,
    MemoryPlan,
    free_memory,
    keep_plan,
    plan_memory,
    reserved,
    shown_size,
)

GIB = 2**30
SDXL_OF_AN_IMAGE = {"nothing": 3.8, "feed-forward": 2.3, "projections": 1.5, "blocks": 0.7}
VAE = int(0.31 * GIB)


def sdxl(recompute: Recompute) -> Footprint:
    """About what an image of 1024x1024 takes."""
    return Footprint(int(4.8 * GIB), int(0.7 * GIB), int(SDXL_OF_AN_IMAGE[recompute] * GIB))


def planned(
    free: float | None = None,
    *,
    mode: str = "auto",
    images: int = 4,
    lean: bool = True,
    told: bool = True,
    measure: Callable[[Recompute], Footprint] = sdxl,
) -> MemoryPlan:
    return plan_memory(
        mode,  # type: ignore[arg-type]
        Batch([(images, 1.0)]),
        measure,
        free=None if free is None else int(free * GIB),
        lean=lean,
        told=told,
    )


def way(plan: MemoryPlan) -> tuple[int, Recompute]:
    return plan.micro, plan.recompute


def test_a_batch_that_fits_is_run_at_once_and_nothing_is_computed_again() -> None:
    plan = planned(24)
    assert way(plan) == (4, "nothing") and plan.fits
    assert plan.needed is not None and plan.needed.activations == pytest.approx(4 * 3.8 * GIB)
    assert plan.peak == reserved(plan.needed.total) < 24 * GIB
    assert reserved(GIB) == pytest.approx(RESERVED * GIB + WORKSPACES)


@pytest.mark.parametrize("free", [6.8, 7.4, 8, 10, 12, 16, 20])
@pytest.mark.parametrize("images", [1, 3, 4, 7, 64])
def test_what_is_chosen_fits_and_nothing_faster_does(free: float, images: int) -> None:
    plan = planned(free, images=images)
    assert plan.fits and plan.peak is not None and plan.peak <= free * GIB
    one = sdxl(plan.recompute)
    assert plan.needed == Footprint(one.weights, one.adapter, plan.micro * one.activations)
    parts = -(-images // plan.micro)
    # in fewer parts, or with less computed again
    for micro in range(1, images + 1):
        for recompute in RECOMPUTE:
            fewer = -(-images // micro) <= parts
            less = RECOMPUTE.index(recompute) <= RECOMPUTE.index(plan.recompute)
            if fewer and less and (-(-images // micro), recompute) != (parts, plan.recompute):
                other = Footprint(one.weights, one.adapter, micro * sdxl(recompute).activations)
                assert reserved(other.total) > free * GIB


def test_more_memory_is_never_slower() -> None:
    order = module._ways(4, lean=True)
    places = [order.index(way(planned(free / 4))) for free in range(28, 100)]
    assert places == sorted(places, reverse=True)
    assert len(set(places)) > 4


def test_parts_are_as_equal_as_they_can_be() -> None:
    micros = {micro for micro, _ in module._ways(7, lean=True)}
    assert micros == {7, 4, 3, 2, 1}  # 5 and 6 make two parts, too, and take more than 4
    assert module._ways(1, lean=True)[0] == (1, "nothing")


def test_without_a_graph_computing_again_costs_more() -> None:
    assert way(planned(13, lean=True)) == (4, "projections")
    assert way(planned(13, lean=False)) == (1, "nothing")


def test_small_takes_the_least_and_fast_takes_what_it_takes() -> None:
    assert way(planned(80, mode="small")) == way(planned(mode="small")) == LEAST == (1, "blocks")
    fast = planned(8, mode="fast")
    assert way(fast) == (4, "nothing") and not fast.fits


def test_where_nothing_fits_the_least_is_tried() -> None:
    plan = planned(6.3)
    assert way(plan) == LEAST and not plan.fits


@pytest.mark.parametrize("mode", ["auto", "fast", "small"])
def test_a_net_that_does_not_fit_is_refused(mode: str) -> None:
    with pytest.raises(MemoryLimitError, match=r"alone take 5\.5 GiB, and 5\.4 GiB") as refused:
        planned(5.4, mode=mode)
    assert refused.value.hint is not None and "nvidia-smi" in refused.value.hint


def test_without_a_gpu_nothing_is_measured_unless_it_is_told() -> None:
    def refuse(recompute: Recompute) -> Footprint:
        raise AssertionError(recompute)

    plan = planned(told=False, measure=refuse)
    assert way(plan) == (4, "nothing") and plan.needed is plan.peak is plan.limit is None
    assert plan.fits
    assert planned().needed is not None


def test_only_what_may_be_chosen_is_measured() -> None:
    asked: list[str] = []

    def measure(recompute: Recompute) -> Footprint:
        asked.append(recompute)
        return sdxl(recompute)

    planned(80, measure=measure)
    assert set(asked) == {"nothing"}


def test_the_largest_part_is_found_among_all_shapes() -> None:
    batch = Batch([(8, 0.25), (3, 1.0), (1, 0.9)])
    assert batch.images == 8
    assert [batch.at_once(micro) for micro in (8, 4, 2, 1)] == [3.0, 3.0, 2.0, 1.0]
    assert Batch([(8, 0.5), (3, 1.0)]).at_once(8) == 4.0


def test_the_vae_encodes_in_tiles_where_memory_is_short() -> None:
    plenty, tight = planned(80), planned(8)
    assert plenty.encodes_whole(2048**2, VAE) and tight.encodes_whole(1024**2, VAE)
    assert not tight.encodes_whole(1536**2, VAE)
    small = planned(80, mode="small")  # there is room, but less is asked for
    assert small.limit == small.peak and not small.encodes_whole(1536**2, VAE)
    assert planned().encodes_whole(4096**2, VAE)


@pytest.mark.parametrize("free", [8, 12, 16, 24, 80])
@pytest.mark.parametrize("side", [512, 768, 1024, 2048])
@pytest.mark.parametrize("images", [1, 4])
def test_a_preview_never_takes_more_than_a_step(free: float, side: int, images: int) -> None:
    plan = planned(free, images=images)
    assert plan.needed is not None and plan.peak is not None
    pixels = side**2 if plan.decodes_whole(side, VAE) else 512**2
    taken = plan.needed.resident + VAE + module.DECODED_PIXEL * pixels
    assert reserved(taken) <= plan.peak


def test_a_preview_is_decoded_whole_where_the_step_takes_as_much() -> None:
    assert planned(24).decodes_whole(1024, VAE)
    assert not planned(8).decodes_whole(1024, VAE)
    assert planned(8).decodes_whole(512, VAE)  # it is one tile
    assert planned().decodes_whole(4096, VAE)


@cache
def of_sdxl(recompute: Recompute) -> Footprint:
    return footprint(
        SDXL,
        rank=16,
        targets="attn+ff+proj",
        dropout=0.0,
        dtype=torch.bfloat16,
        latents=(1, 128, 128),
        states=77,
        lean=True,
        recompute=recompute,
    )


@pytest.mark.parametrize(
    ("free", "micro", "ways"),
    [
        (8, {1, 2, 4}, {"projections", "blocks"}),
        (12, {2, 4}, {"feed-forward", "projections", "blocks"}),
        (16, {4}, {"feed-forward", "projections"}),
        (24, {4}, {"nothing", "feed-forward"}),
    ],
)
def test_sdxl_on_real_cards(free: int, micro: set[int], ways: set[str]) -> None:
    plan = planned(free, measure=of_sdxl)
    assert plan.fits and plan.micro in micro and plan.recompute in ways


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 24 GiB, of which another process holds 4, and this one 1."""
    for name, value in {
        "mem_get_info": (19 * GIB, 24 * GIB),
        "memory_reserved": GIB,
        "get_per_process_memory_fraction": 1.0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value, raising=False)


@pytest.mark.usefixtures("card")
def test_what_others_hold_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    assert free_memory(device) == 20 * GIB
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    assert free_memory(device) == 12 * GIB
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    assert free_memory(device) == 20 * GIB


def test_passes_without_gradients_run_no_more_at_once_than_steps_do() -> None:
    plan = planned(8)
    assert plan.without_gradients == plan.micro
    assert replace(plan, micro=2, free=None).without_gradients == 8
    assert replace(plan, micro=16, free=None).without_gradients == 16


def test_nothing_is_known_of_a_cpu() -> None:
    assert free_memory(torch.device("cpu")) is None


@pytest.mark.gpu
def test_a_process_that_is_capped_knows_it() -> None:
    device = torch.device("cuda", 0)
    everything = free_memory(device)
    torch.cuda.set_per_process_memory_fraction(0.05, device)
    try:
        found = free_memory(device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    total = torch.cuda.get_device_properties(device).total_memory
    assert found is not None and everything is not None
    assert found == pytest.approx(0.05 * total, rel=0.01)
    assert found < everything <= total


def test_the_speed_hangs_on_the_way() -> None:
    plan = planned(8)
    assert plan.pace == f"{plan.micro} at once, lean blocks, {plan.recompute} recomputed"
    for change in ({"micro": 1}, {"lean": False}, {"recompute": "nothing"}):
        assert replace(plan, **change).pace != plan.pace


def test_sizes_for_people() -> None:
    assert [shown_size(size) for size in (0, 10 * 2**20, int(1.5 * GIB))] == [
        "0 MiB",
        "10 MiB",
        "1.5 GiB",
    ]


def kept(free: float | None, record: dict[str, object], images: int = 4) -> MemoryPlan:
    return keep_plan(planned(free, images=images), Batch([(images, 1.0)]), sdxl, record)


@pytest.mark.parametrize("free", [10, 24, 80])
def test_an_earlier_plan_is_taken_again_though_another_is_faster(free: float) -> None:
    before = replace(planned(9), halved=1)
    assert way(before) != way(planned(24))
    again = kept(free, json.loads(json.dumps(before.record)))
    assert again.record == before.record and again.fits
    assert again.needed == before.needed and again.free == int(free * GIB)


def test_one_that_does_not_fit_any_more_is_refused() -> None:
    with pytest.raises(MemoryLimitError, match="4 at once, lean blocks, nothing recomputed") as no:
        kept(12, planned(24).record)
    assert "12.0 GiB are free" in str(no.value)
    assert "--allow-change train.deterministic" in str(no.value.hint)


def test_without_a_gpu_it_is_taken_as_it_is() -> None:
    assert kept(None, planned(9).record).record == planned(9).record


@pytest.mark.parametrize(
    "change",
    [
        {"memory.mode": "small"},
        {"memory.at_once": 0},
        {"memory.at_once": "4"},
        {"memory.halved": -1},
        {"memory.recompute": "everything"},
        None,
    ],
)
def test_what_is_no_plan_of_this_setting_is_not_kept(change: dict[str, object] | None) -> None:
    record = {} if change is None else planned(9).record | change
    assert kept(24, record) == planned(24)
