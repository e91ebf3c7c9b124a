"""Flat AdamW: the definition against PyTorch's, the kernel against the definition."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor, nn

from eri.layers.adamw import (
    CONTROL_SIZE,
    Control,
    adamw_,
    adamw_reference,
    adamw_workspace,
    unsupported,
)
from eri.layers.backend import set_backend
from eri.layers.build import SOURCES

LR = float(torch.tensor(3e-3))  # as the control block holds it
SDXL_PARAMETERS = 42_560_000  # of a LoRA of rank 16 on every linear layer
ODD_SIZES = (1, 3, 4, 5, 1023, 2048, 2049, 300_007)
LARGE = 2**31 + 5

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass
class Flat:
    """The buffers of one update."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grad: Tensor
    control: Tensor
    workspace: Tensor

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> "Flat":
        """A copy; a type is that of the four buffers of float32."""
        copies = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            wanted = dtype if field.name in {"master", "exp_avg", "exp_avg_sq", "grad"} else None
            copies[field.name] = tensor.to(device=device, dtype=wanted, copy=True)
        return Flat(**copies)

    def update(self, **settings: object) -> None:
        adamw_(
            self.master,
            self.exp_avg,
            self.exp_avg_sq,
            self.grad,
            control=self.control,
            workspace=self.workspace,
            **settings,
        )

    def step(self, number: int, grad: Tensor, *, loss: float = 1.0, **settings: object) -> None:
        """One step, as a run does it."""
        start = [LR, 0.25, float(number), loss]
        self.control[: len(start)] = torch.tensor(start, device=self.control.device)
        self.grad.copy_(grad)
        self.update(**settings)

    def __getitem__(self, place: Control) -> float:
        return self.control[place].item()


def make(n: int, *, scale: float = 1.0, device: str = "cpu") -> Flat:
    """Parameters of about one, which have not been updated yet."""
    device = torch.device(device)
    master = torch.randn(n, device=device)
    control = torch.zeros(CONTROL_SIZE, device=device)
    control[Control.SCALE] = scale
    return Flat(
        master,
        torch.zeros_like(master),
        torch.zeros_like(master),
        torch.zeros_like(master),
        control,
        adamw_workspace(device),
    )


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


class Torch:
    """The same by `torch.optim.AdamW` and `clip_grad_norm_`."""

    def __init__(self, flat: Flat, dtype: torch.dtype, **settings: float) -> None:
        self.parameter = nn.Parameter(flat.master.to(dtype, copy=True))
        self.optimizer = torch.optim.AdamW([self.parameter], lr=LR, **settings)

    def step(self, grad: Tensor, max_grad_norm: float) -> Tensor:
        self.parameter.grad = grad.to(self.parameter.dtype, copy=True)
        norm = torch.nn.utils.clip_grad_norm_([self.parameter], max_grad_norm)
        self.optimizer.step()
        return norm

    @property
    def state(self) -> dict[str, Tensor]:
        kept = self.optimizer.state[self.parameter]
        return {
            "master": self.parameter.detach(),
            "exp_avg": kept["exp_avg"],
            "exp_avg_sq": kept["exp_avg_sq"],
        }


SETTINGS = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize("max_grad_norm", [math.inf, 20.0], ids=["unclipped", "clipped"])
def test_the_definition_is_pytorchs_adamw(max_grad_norm: float) -> None:
    flat = make(1001).to(torch.float64)
    exact = Torch(flat, torch.float64, **SETTINGS)
    for number in range(1, 31):
        grad = torch.randn(1001, dtype=torch.float64) * number  # clipped and not
        norm = exact.step(grad, max_grad_norm)
        flat.step(number, grad, max_grad_norm=max_grad_norm, **SETTINGS)
        assert flat[Control.GRAD_NORM] == pytest.approx(norm.item(), rel=1e-6)
    for name, expected in exact.state.items():
        assert error(getattr(flat, name), expected) < 1e-12
    assert flat[Control.UPDATES] == 30


def test_in_float32_it_is_no_less_exact_than_pytorchs() -> None:
    flat = make(4096)
    exact = Torch(flat, torch.float64, **SETTINGS)
    eager = Torch(flat, torch.float32, **SETTINGS)
    for number in range(1, 101):
        grad = torch.randn(4096)
        for other in (exact, eager):
            other.step(grad, 30.0)
        flat.step(number, grad, max_grad_norm=30.0, **SETTINGS)
    ulp = torch.finfo(torch.float32).eps
    for name, expected in exact.state.items():
        assert error(getattr(flat, name), expected) <= 2 * error(eager.state[name], expected) + ulp


def test_the_gradient_is_zero_afterwards() -> None:
    flat = make(77)
    flat.step(1, torch.randn(77))
    assert torch.equal(flat.grad, torch.zeros(77))


def test_gaps_stay_zero() -> None:
    flat = make(64)
    gap = torch.arange(64) % 8 > 4
    flat.master[gap] = 0
    for number in range(1, 6):
        flat.step(number, torch.randn(64).masked_fill_(gap, 0), weight_decay=0.5)
    assert not flat.master[gap].any()
    assert flat.master[~gap].all()


def test_an_empty_adapter_counts_its_steps() -> None:
    flat = make(0)
    flat.step(1, torch.zeros(0))
    assert flat[Control.UPDATES] == 1
    assert flat[Control.GRAD_NORM] == 0


def unchanged(flat: Flat, before: Flat) -> bool:
    """Whether nothing was updated, and the gradient is zero nevertheless."""
    same = (
        torch.equal(getattr(flat, name), getattr(before, name))
        for name in ("master", "exp_avg", "exp_avg_sq")
    )
    return all(same) and not flat.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_ends_all_updates(device: str, value: float, where: str) -> None:
    flat = make(5001, device=device)
    grad = torch.randn(5001, device=device)
    flat.step(1, grad)
    before = flat.to()
    wrong = grad.clone()
    wrong[4999] = value if where == "gradient" else 0
    flat.step(2, wrong, loss=value if where == "loss" else 1.0)
    assert flat[Control.BAD] == 2
    assert unchanged(flat, before)
    flat.step(3, grad)  # and so does every later step, however good
    assert flat[Control.BAD] == 2
    assert flat[Control.UPDATES] == 1
    assert unchanged(flat, before)
    assert flat[Control.GRAD_NORM] == pytest.approx(grad.norm().item(), rel=1e-5)
    assert flat[Control.SCALE] == 1


@pytest.mark.parametrize("device", DEVICES)
def test_an_overflow_halves_the_scale_and_leaves_the_step_out(device: str) -> None:
    flat = make(100, scale=4.0, device=device)
    grad = torch.randn(100, device=device)
    flat.step(1, grad, growth_interval=2)
    assert flat[Control.GROWTH] == 1
    before = flat.to()
    overflow = grad.clone()
    overflow[50] = math.inf
    for step, scale in ((2, 2.0), (3, 1.0), (4, 0.5)):
        flat.step(step, overflow, growth_interval=2)
        assert unchanged(flat, before)
        assert (flat[Control.SCALE], flat[Control.GROWTH]) == (scale, 0)
        assert (flat[Control.BAD], flat[Control.UPDATES]) == (0, 1)
    flat.step(5, overflow, growth_interval=2)  # not the scale's fault
    assert flat[Control.BAD] == 5
    assert flat[Control.SCALE] == 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_that_is_not_finite_is_no_overflow(device: str) -> None:
    flat = make(10, scale=1024.0, device=device)
    flat.step(1, torch.ones(10), loss=math.nan, growth_interval=2)
    assert flat[Control.BAD] == 1
    assert flat[Control.SCALE] == 1024


@pytest.mark.parametrize("device", DEVICES)
def test_the_scale_grows_after_enough_updates(device: str) -> None:
    flat = make(10, scale=8.0, device=device)
    scales, growths = [], []
    for number in range(1, 8):
        flat.step(number, torch.ones(10), growth_interval=3)
        scales.append(flat[Control.SCALE])
        growths.append(flat[Control.GROWTH])
    assert scales == [8, 8, 16, 16, 16, 32, 32]
    assert growths == [1, 2, 0, 1, 2, 0, 1]
    flat.control[Control.SCALE] = 2.0**127
    flat.control[Control.GROWTH] = 2
    flat.step(8, torch.ones(10), growth_interval=3)
    assert flat[Control.SCALE] == 2.0**127  # twice that is infinite


@pytest.mark.parametrize("device", DEVICES)
def test_the_scale_of_the_loss_changes_no_bit(device: str) -> None:
    plain, scaled = make(999, device=device), None
    scaled = plain.to()
    scaled.control[Control.SCALE] = 65536.0
    for number in range(1, 4):
        grad = torch.randn(999, device=device)
        plain.step(number, grad, max_grad_norm=5.0)
        scaled.step(number, grad * 65536, max_grad_norm=5.0, growth_interval=100)
    assert torch.equal(plain.master, scaled.master)
    assert plain[Control.GRAD_NORM] == scaled[Control.GRAD_NORM]


def test_what_cannot_be_is_refused() -> None:
    flat = make(8)
    for name, wrong in (("grad", torch.zeros(7)), ("exp_avg", torch.zeros(8, 1))):
        other = flat.to()
        setattr(other, name, wrong)
        with pytest.raises(ValueError, match=r"one length, found \[8\]"):
            other.update()
    short = flat.to()
    short.control = torch.zeros(9)
    with pytest.raises(ValueError, match=r"\[16\] and a workspace \[16384\], found \[9\]"):
        short.update()
    with pytest.raises(ValueError, match="eps > 0"):
        flat.update(eps=0.0)
    with pytest.raises(ValueError, match="betas < 1"):
        flat.update(betas=(0.9, 1.0))


def reason(**changes: Tensor | None) -> str | None:
    flat = make(64)
    for name, tensor in changes.items():
        setattr(flat, name, tensor)
    return unsupported(
        flat.master,
        flat.exp_avg,
        flat.exp_avg_sq,
        flat.grad,
        control=flat.control,
        workspace=flat.workspace,
    )


def test_reasons_are_in_words() -> None:
    assert reason() is None
    assert reason(grad=torch.zeros(64, dtype=torch.float64)) == "grad is float64, not float32"
    assert reason(exp_avg=torch.zeros(128)[::2]) == "exp_avg is not contiguous"
    shifted = torch.zeros(65)[1:]
    assert reason(master=shifted) == "master does not begin at a multiple of 16 bytes"
    elsewhere = torch.zeros(64, device="meta")
    assert reason(exp_avg_sq=elsewhere) == "exp_avg_sq is on meta, master on cpu"


def arguments(flat: Flat) -> tuple[object, ...]:
    buffers = tuple(getattr(flat, field.name) for field in fields(flat))
    return (*buffers, 0.9, 0.999, 1e-8, 0.01, 1.0, 10)


@pytest.mark.parametrize("device", DEVICES)
def test_the_op_is_registered_as_pytorch_wants_it(device: str) -> None:
    flat = make(50, device=device)
    flat.step(1, torch.randn(50, device=device))  # loads the kernels where there are some
    flat.grad.normal_()
    torch.library.opcheck(torch.ops.eri.adamw_.default, arguments(flat))


def test_the_op_on_the_cpu_is_the_definition() -> None:
    flat = make(50)
    flat.grad.normal_()
    flat.control[Control.LR] = LR
    same = flat.to()
    torch.ops.eri.adamw_(*arguments(flat))
    same.update(max_grad_norm=1.0, growth_interval=10)
    assert torch.equal(flat.master, same.master)
    assert torch.equal(flat.control, same.control)


def test_the_kernel_has_the_same_places_and_sizes() -> None:
    header = (SOURCES / "adamw.h").read_text()
    places = dict(re.findall(r"k(\w+) = (\d+),", header))
    assert places.pop("ControlSize") == str(CONTROL_SIZE)
    names = {place.name.title().replace("_", ""): str(int(place)) for place in Control}
    assert places == names
    found = re.search(r"kAdamwWorkspaceBytes = (\d+);", header)
    assert found is not None
    assert int(found[1]) == adamw_workspace(torch.device("cpu")).numel()


def test_the_backend_cuda_refuses_other_devices() -> None:
    set_backend("cuda")
    with pytest.raises(Exception, match="this is cpu"):
        make(8).update()


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("n", ODD_SIZES)
def test_the_kernel_is_no_less_exact_than_eager(n: int) -> None:
    set_backend("cuda")
    kernel = make(n, device="cuda")
    exact, eager = kernel.to(torch.float64), kernel.to()
    norm = math.sqrt(n)
    for number in range(1, 21):
        grad = torch.randn(n, device="cuda") * (1 + number % 3)  # clipped and not
        kernel.step(number, grad, max_grad_norm=1.5 * norm, **SETTINGS)
        set_backend("reference")
        for other in (exact, eager):
            other.step(number, grad, max_grad_norm=1.5 * norm, **SETTINGS)
        set_backend("cuda")
        assert not kernel.grad.any()
    ulp = torch.finfo(torch.float32).eps
    for name in ("master", "exp_avg", "exp_avg_sq"):
        truth = getattr(exact, name)
        least = error(getattr(eager, name), truth)
        assert error(getattr(kernel, name), truth) <= 2 * least + ulp, name
    torch.testing.assert_close(kernel.control, exact.control, rtol=1e-6, atol=0)


@gpu
def test_the_kernel_gives_the_same_bits_twice() -> None:
    set_backend("cuda")
    first = make(3_000_001, device="cuda")
    second = first.to()
    for number in range(1, 4):
        grad = torch.randn(3_000_001, device="cuda")
        for flat in (first, second):
            flat.step(number, grad, max_grad_norm=1.0)
    for field in fields(Flat):
        found, again = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(found, again), field.name


@gpu
def test_the_kernel_is_captured_and_replayed() -> None:
    set_backend("cuda")
    replayed = make(100_003, device="cuda")
    replayed.step(1, torch.randn(100_003, device="cuda"), max_grad_norm=1.0)
    eager = replayed.to()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.update(max_grad_norm=1.0)
    for number in range(2, 6):
        grad = torch.randn(100_003, device="cuda")
        eager.step(number, grad, max_grad_norm=1.0)
        start = [LR, 0.25, float(number), 1.0]
        replayed.control[: len(start)] = torch.tensor(start, device="cuda")
        replayed.grad.copy_(grad)
        graph.replay()
    assert replayed[Control.UPDATES] == 5
    assert torch.equal(replayed.master, eager.master)
    assert torch.equal(replayed.control, eager.control)


@gpu
def test_the_definition_is_captured_and_replayed() -> None:
    set_backend("reference")
    replayed = make(1003, device="cuda")
    eager = replayed.to()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        replayed.to().update(max_grad_norm=1.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.update(max_grad_norm=1.0)
    for number in range(1, 4):
        grad = torch.randn(1003, device="cuda")
        eager.step(number, grad, max_grad_norm=1.0)
        start = [LR, 0.25, float(number), 1.0]
        replayed.control[: len(start)] = torch.tensor(start, device="cuda")
        replayed.grad.copy_(grad)
        graph.replay()
    assert torch.equal(replayed.master, eager.master)


@gpu
def test_the_kernel_runs_on_the_current_stream() -> None:
    set_backend("cuda")
    flat = make(1_000_000, device="cuda")
    flat.control[Control.LR] = LR
    same = flat.to()
    grad = torch.randn(1_000_000, device="cuda")
    flat.to().update()  # nothing is built or loaded below
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        flat.grad.copy_(grad)  # comes late: on another stream the update would see zeroes
        flat.update()
    torch.cuda.synchronize()
    same.grad.copy_(grad)
    same.update()
    assert torch.equal(flat.exp_avg, same.exp_avg)


@gpu
def test_the_kernel_names_what_it_cannot_take() -> None:
    set_backend("cuda")
    flat = make(64, device="cuda")
    flat.step(1, torch.randn(64, device="cuda"))
    for name, wrong, message in (
        ("grad", torch.zeros(63, device="cuda"), "grad is not one contiguous row of 64"),
        ("exp_avg", torch.zeros(64), "exp_avg is not on cuda:0"),
        ("exp_avg_sq", torch.zeros(65, device="cuda")[1:], "exp_avg_sq does not begin"),
        ("control", torch.zeros(16, device="cuda").half(), "control is of type Half"),
    ):
        other = flat.to()
        setattr(other, name, wrong)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.eri.adamw_(*arguments(other))


@gpu
def test_more_than_two_thousand_million_parameters() -> None:
    if torch.cuda.mem_get_info()[0] < 5 * 4 * LARGE:
        pytest.skip("needs 43 GB of free GPU memory")
    set_backend("cuda")
    flat = make(1, device="cuda")
    for name in ("master", "exp_avg", "exp_avg_sq", "grad"):
        setattr(flat, name, torch.zeros(LARGE, device="cuda"))
    ends = torch.tensor([0, LARGE - 1, LARGE - 6, LARGE // 2], device="cuda")
    flat.control[Control.LR] = 0.5
    flat.grad[ends] = 2.0
    flat.update(weight_decay=0.0)
    assert flat[Control.GRAD_NORM] == 4
    assert torch.equal(flat.master[ends], torch.full((4,), -0.5, device="cuda"))
    assert torch.count_nonzero(flat.master) == 4
    assert not flat.grad.any()


@gpu
def test_bandwidth() -> None:
    set_backend("cuda")
    flat = make(SDXL_PARAMETERS, device="cuda")
    flat.control[Control.LR] = LR
    big = [torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2)]
    bytes_moved = SDXL_PARAMETERS * (8 * 4 + 4)  # eight passes, the norm's

    def kernel() -> None:
        flat.grad[:1].fill_(1.0)
        flat.update(max_grad_norm=1.0)

    def reference() -> None:
        set_backend("reference")
        kernel()
        set_backend("cuda")

    times = {
        "kernel": _milliseconds(kernel),
        "reference": _milliseconds(reference),
        "copy": _milliseconds(lambda: big[0].copy_(big[1])),
    }
    copied = 2 * 2**30 / times["copy"] / 1e9
    reached = bytes_moved / times["kernel"] / 1e9
    print(
        f"\n{SDXL_PARAMETERS / 1e6:.1f} M parameters: kernel {times['kernel']:.3f} ms, "
        f"{reached:.2f} TB/s; a copy {copied:.2f} TB/s; reference {times['reference']:.3f} ms"
    )
    assert reached > 0.7 * copied


def _milliseconds(work: Callable[[], object], repeats: int = 20, windows: int = 5) -> float:
    """The time of a piece of work: the median of some windows of repeats without a gap."""
    times = []
    for _ in range(windows + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / repeats)
    return sorted(times[1:])[windows // 2]  # the first one warms up


def test_the_definition_takes_no_other_memory_than_the_gradients() -> None:
    flat = make(1 << 20)
    flat.grad.normal_()
    with torch.profiler.profile(profile_memory=True) as profile:
        adamw_reference(
            flat.master,
            flat.exp_avg,
            flat.exp_avg_sq,
            flat.grad,
            control=flat.control,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.01,
            max_grad_norm=1.0,
            growth_interval=0,
        )
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < 1 << 20
