"""The time of a batch without its waits."""

from __future__ import annotations

import time

import pytest
import torch

from nemologger.watch.own_time import Stopwatch


@pytest.mark.usefixtures("clock")
def test_waits_are_taken_off_and_data_is_told_apart():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(3):
        watch.fetch_began()
        time.sleep(0.02)
        watch.fetch_ended()
        watch.batch_began()
        time.sleep(0.01)
        watch.wait_began()
        time.sleep(0.1)
        watch.wait_ended()
        watch.batch_ended()
    own = watch.take()
    assert own.batches == 3
    assert (own.data, own.compute) == pytest.approx((0.02, 0.01))
    assert watch.take().batches == 0


@pytest.mark.usefixtures("clock")
def test_what_is_outside_a_batch_does_not_count():
    watch = Stopwatch(torch.device("cpu"))
    watch.wait_ended()
    watch.batch_ended()
    watch.wait_began()  # a forward pass of validation
    watch.batch_began()
    time.sleep(0.01)
    watch.wait_ended()
    watch.batch_ended()
    assert watch.take().compute == pytest.approx(0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed_by_what_it_does_not_by_what_was_launched():
    device = torch.device("cuda")
    cycles = 100_000_000
    watch = Stopwatch(device)
    for _ in range(6):
        watch.batch_began()
        torch.cuda._sleep(cycles)
        watch.wait_began()
        torch.cuda._sleep(3 * cycles)
        watch.wait_ended()
        watch.batch_ended()
    torch.cuda.synchronize()
    watch.batch_began()
    watch.batch_ended()
    tries = []
    for _ in range(3):  # a busy machine makes one longer
        start = time.perf_counter()
        torch.cuda._sleep(cycles)
        torch.cuda.synchronize()
        tries.append(time.perf_counter() - start)
    expected = min(tries)
    assert 0.5 * expected < watch.take().compute < 2 * expected
