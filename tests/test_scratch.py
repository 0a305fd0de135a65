"""The scratch of decoded weights: reused, bounded, given back, and never shared by two at a time."""

import threading

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from peft_fast import LoRALinear, scratch

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and graphs are a GPU's")


@pytest.fixture(autouse=True)
def _fresh():
    scratch.free()
    limit = scratch.limit()
    yield
    scratch.set_limit(limit)
    scratch.free()


def address(shape, dtype=torch.float32, device=CPU):
    with scratch.borrow(shape, dtype, device) as buffer:
        assert (tuple(buffer.shape), buffer.dtype, buffer.device.type) == (shape, dtype, device.type)
        buffer.fill_(1.0)
        return buffer.data_ptr()


def test_layers_share_one_buffer():
    first = address((256, 128))
    assert address((100, 64)) == first
    assert address((512, 128), torch.bfloat16) == first
    assert scratch.allocated() == 256 * 128 * 4
    address((512, 128))
    assert scratch.allocated() == 512 * 128 * 4
    scratch.free()
    assert scratch.allocated() == 0


def test_an_empty_panel():
    address((0, 128))
    address((128, 0))


def test_the_limit_bounds_panels_and_frees_what_exceeds_it():
    address((1024, 1024))
    scratch.set_limit(2 << 20)
    assert scratch.limit() == 2 << 20
    assert scratch.allocated() == 0
    panels = scratch.panels(1000, 4096)
    assert panels == [(0, 512), (512, 488)]
    assert scratch.panels(300, 1 << 30) == [(0, 128), (128, 128), (256, 44)]
    assert scratch.panels(0, 4096) == []
    for _, rows in panels:
        address((rows, 1024))
    assert scratch.allocated() <= scratch.limit()


@pytest.mark.parametrize("n_bytes", [0, -1, (1 << 20) - 1])
def test_a_limit_too_small_is_refused(n_bytes):
    before = scratch.limit()
    with pytest.raises(ValueError, match="n_bytes: expected at least 1048576"):
        scratch.set_limit(n_bytes)
    assert scratch.limit() == before


def test_threads_take_turns():
    """A thread that borrows while another does waits: its panel would overwrite what the other multiplies."""
    entered, seen = threading.Event(), []

    def other():
        entered.set()
        with scratch.borrow((128, 128), torch.float32, CPU) as buffer:
            seen.append("other")
            buffer.fill_(2.0)

    with scratch.borrow((128, 128), torch.float32, CPU) as buffer:
        buffer.fill_(1.0)
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        thread.join(0.05)
        seen.append("first")
        assert (buffer == 1.0).all()
    thread.join(10)
    assert seen == ["first", "other"]


@needs_cuda
def test_streams_have_buffers_of_their_own():
    device = torch.device("cuda", torch.cuda.current_device())
    first = address((256, 128), device=device)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert address((256, 128), device=device) != first
    assert address((256, 128), device=device) == first


@needs_cuda
def test_a_graph_replays_after_the_scratch_was_freed_and_grew():
    layer = LoRALinear.from_linear(
        Linear4bit(512, 256, bias=False, quant_type="nf4").cuda(),
        r=8, backend="triton-merge",
    )  # fmt: skip
    x = torch.randn(32, 512, device="cuda")
    expected = layer(x).detach().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    scratch.free()
    address((2048, 2048), device=x.device)
    graph.replay()
    torch.testing.assert_close(y, expected)
