"""A call as a CUDA graph."""

from collections.abc import Callable

import torch


def capture(
    call: Callable[[], object], stream: torch.cuda.Stream, pool: tuple[int, int] | None = None
) -> torch.cuda.CUDAGraph:
    """The call as a graph, which runs by `replay()`; captured on `stream`, nothing is computed.

    Args:
        call: has run before, so that nothing of it is left to be compiled or set up.
        pool: memory that the graph shares with others; None: its own.

    Raises:
        RuntimeError: it cannot be captured (it waits for the GPU, say). Stream and generator, which
            torch then leaves as they are in a capture, are as before.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.get_state()
    try:
        # Other threads go on, as one that pins the next batch does.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        torch.cuda.set_stream(before)
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        generator.set_state(state)
        raise
    return graph
