"""Steps that are broken off: by Ctrl-C, or by an error in the middle."""

import copy
import pickle
import signal
import threading

import pytest
import torch

import robustft_kernels as rft
from robustft_kernels.optim.wrapper import Anchored
from robustft_kernels.step.guard import StepGuard, uninterrupted
from tests.test_optimizers import give_grads, make

BROKEN = r"broken off half-way.*load the last checkpoint"


class Stubborn(torch.optim.SGD):
    """Does something else before or after its step."""

    before = after = staticmethod(lambda: None)

    def step(self, closure=None):
        self.before()
        super().step(closure)
        self.after()


def interrupt():
    signal.raise_signal(signal.SIGINT)


def fail():
    raise ValueError("out of luck")


def wrapped(params):
    return Anchored(Stubborn(params, lr=0.1), "project", radius=0.01)


def interrupted(times, done):
    with uninterrupted():
        for _ in range(times):
            interrupt()
        done.append("the rest")


@pytest.mark.parametrize(("times", "rest"), [(1, ["the rest"]), (2, [])])
def test_an_interrupt_waits_for_the_end_of_the_block(times, rest):
    """A second one does not."""
    done = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(times, done)
    assert done == rest
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_is_left_alone():
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(1))
    try:
        with uninterrupted():
            interrupt()
            assert came == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_have_no_signals():
    def use():
        with uninterrupted():
            done.append(1)

    done = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert done


def test_an_interrupted_step_of_the_wrapper_is_whole():
    params, others = make(), make()
    optimizer, undisturbed = wrapped(params), wrapped(others)
    for t in range(3):
        give_grads(params, t)
        give_grads(others, t)
        optimizer.optimizer.after = interrupt if t == 1 else lambda: None
        if t == 1:
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        else:
            optimizer.step()
        undisturbed.step()
        assert all(map(torch.equal, params, others))
    optimizer.state_dict()


def broken_off(optimizer, params):
    """Breaks a step off after the first write."""
    give_grads(params, 5)
    if isinstance(optimizer, Anchored):
        optimizer.optimizer.after = fail
        with pytest.raises(ValueError, match="out of luck"):
            optimizer.step()
        optimizer.optimizer.after = lambda: None
        return
    (launch,) = optimizer._plans.current.launches
    whole = launch.finish
    launch.finish = lambda: whole() or fail()
    with pytest.raises(ValueError, match="out of luck"):
        optimizer.step()
    launch.finish = whole


@pytest.mark.parametrize("kind", ["wrapper", "in parts"])
def test_a_step_that_broke_off_is_known(kind):
    """Until a checkpoint is loaded, also to copies."""

    def optimizer_of(params):
        return wrapped(params) if kind == "wrapper" else rft.AdamFTP(params, lr=1e-2, backend="reference")

    params = make()
    optimizer = optimizer_of(params)
    for t in range(2):
        give_grads(params, t)
        optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    broken_off(optimizer, params)
    copies = [optimizer] if kind == "wrapper" else [optimizer, copy.deepcopy(optimizer)]
    for of in copies:
        for use in (of.step, of.state_dict):
            with pytest.raises(RuntimeError, match=BROKEN):
                use()
    with torch.no_grad():
        for p, weight in zip(params, weights, strict=True):
            p.copy_(weight)
    optimizer.load_state_dict(saved)
    others = make()
    undisturbed = optimizer_of(others)
    for t in range(3):
        give_grads(others, t)
        undisturbed.step()
    give_grads(params, 2)
    optimizer.step()
    assert all(map(torch.equal, params, others))


def test_an_error_before_the_first_write_breaks_nothing():
    params = make()
    optimizer = wrapped(params)
    optimizer.optimizer.before = fail
    give_grads(params, 0)
    with pytest.raises(ValueError, match="out of luck"):
        optimizer.step()
    optimizer.optimizer.before = lambda: None
    optimizer.step()
    optimizer.state_dict()
    optimizer = rft.AdamSPD(params, max_grad_norm=1.0, backend="reference")
    optimizer.max_grad_norm = "one"
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.max_grad_norm = None
    optimizer.step()


def test_guards_are_copied():
    guard = StepGuard()
    guard.broke_off(True)
    with pytest.raises(RuntimeError, match=BROKEN):
        pickle.loads(pickle.dumps(guard)).check()
