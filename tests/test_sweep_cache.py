"""Projections come again to the same tensors. Their sweeps are prepared once, keep no tensor alive, and are right when
other tensors take the place of those."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import robustft_kernels as rft
from robustft_kernels.backends import native, registry
from robustft_kernels.core.exchange import Segments
from robustft_kernels.core.methods import NORMS, RULES
from robustft_kernels.finetune import projection
from robustft_kernels.step import no_step, sweep_cache
from robustft_kernels.step.fingerprint import forms
from robustft_kernels.step.sweep_cache import SweepCache

from .plain_projection import by_rows, norms_of, oracle

SHAPES = ((5, 7), (12,), (), (0, 3), (2, 3, 4))


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    monkeypatch.setattr(projection, "SWEEPS", SweepCache())
    monkeypatch.setattr(projection, "SWEEPS_OF_COPIES", SweepCache())
    monkeypatch.setattr(projection.Ball.__init__, "__defaults__", (projection.SWEEPS,))


@pytest.fixture(params=[name for name in ("native", "cuda", "triton") if not rft.backends()[name]])
def prepared(request, device, monkeypatch):
    """One backend serves. Returns how many tensors each sweep was prepared for."""
    if objection := registry.objection_to(request.param, device, {torch.float32}):
        pytest.skip(objection)
    seen = []

    def prepare(table, of=registry.BACKENDS[request.param].prepare):
        seen.append(len(table.tensors))
        return of(table)

    for name, backend in registry.BACKENDS.items():
        serves = name == request.param
        chosen = replace(backend, not_chosen=lambda serves=serves: "" if serves else "not in this test")
        monkeypatch.setitem(registry.BACKENDS, name, replace(chosen, prepare=prepare) if serves else chosen)
    return seen


def pair(device, seed=0, shapes=SHAPES, dtype=torch.float32):
    rng = torch.Generator("cpu").manual_seed(seed)
    return tuple([torch.randn(s, generator=rng, device="cpu").to(device, dtype) for s in shapes] for _ in range(2))


def assert_deviation(params, anchors, norm):
    found = rft.deviation(params, anchors, norm)
    for n, p, a in zip(found, params, anchors or [0] * len(params), strict=True):
        torch.testing.assert_close(n, norms_of(p.double() - a, norm), rtol=1e-5, atol=1e-12)


def assert_projection(params, anchors, radius, norm):
    start = [p.detach().double() for p in params]
    rft.project_(params, anchors, radius, norm)
    zeros = [torch.zeros_like(s) for s in start]
    for k, (p, s, a) in enumerate(zip(params, start, anchors or zeros, strict=True)):
        gamma = radius if isinstance(radius, float) or radius.numel() == 1 else radius[k]
        torch.testing.assert_close(p.detach().double(), oracle(s, a.double(), gamma, norm), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_steady_call_prepares_nothing(prepared, device, norm):
    """Whatever numbers the tensors and the radii have by then. Two models take turns."""
    models = [pair(device, seed) for seed in (0, 1)]
    counts = []
    for turn in range(4):
        for params, anchors in models:
            for tensors in (params, anchors):
                for k, of in enumerate(tensors):
                    of.add_(torch.randn(of.shape, device=device), alpha=0.5 + k)
            assert_deviation(params, anchors, norm)
            radii = torch.rand(len(params), device=device) + 0.1
            assert_projection(params, anchors, radii if turn % 2 else 0.3 + turn, norm)
            start = [p.clone() for p in params]
            rft.interpolate_(params, anchors, turn / 4)
            for p, s, a in zip(params, start, anchors, strict=True):
                torch.testing.assert_close(p, a + turn / 4 * (s - a), rtol=1e-5, atol=1e-6)
        counts.append(len(prepared))
    assert counts == [6, 6, 6, 6]


@pytest.mark.parametrize("norm", NORMS)
def test_a_steady_call_sends_nothing_to_the_device(prepared, device, norm, monkeypatch):
    if "triton" not in rft.backends() or registry.BACKENDS["triton"].not_chosen():
        pytest.skip("the native backend has no device")
    from robustft_kernels.triton_kernels import table

    built, staged = [], []
    init = table.Table.__init__
    monkeypatch.setattr(table.Table, "__init__", lambda self, *args: (built.append(self), init(self, *args))[1])
    for module in (table, sweep_cache, projection):
        send = module.staged
        monkeypatch.setattr(module, "staged", lambda of, where, send=send: (staged.append(of), send(of, where))[1])
    params, anchors = pair(device)
    radii = torch.rand(len(params), device=device) + 0.1
    for turn in range(3):
        rft.deviation(params, anchors, norm)
        rft.project_(params, anchors, radii + turn, norm)
        rft.project_(params, anchors, 1.0 + turn, norm)
        rft.interpolate_(params, anchors, radii.clamp(max=1))
        if not turn:
            tables, sends, rows = len(built), len(staged), [t._row.sends for t in built]
            assert tables == 3
    assert (len(built), len(staged), [t._row.sends for t in built]) == (tables, sends, rows)


@pytest.mark.parametrize("norm", NORMS)
def test_tpgm_prepares_nothing_in_later_steps(prepared, device, norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(device)
    tpgm = rft.TPGM(model, norm=norm, init=0.05)
    batch = torch.randn(8, 4, device=device)

    def train():
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)

    counts = []
    for _ in range(3):
        train()
        tpgm.project_()
        counts.append(len(prepared))
    assert counts == [2, 2, 2]
    tpgm.update(lambda x: model(x).square().mean(), [batch], steps=1)
    first = len(prepared)
    assert first == 2 + 4  # the norms are known. Each gradient is reduced alone
    tpgm.update(lambda x: model(x).square().mean(), [batch], steps=5)
    assert len(prepared) <= first + 4, "the sweeps of one update serve all its steps"
    copy.deepcopy(tpgm).project_()


def test_no_tensor_is_kept_alive(prepared, device):
    params, anchors = pair(device, shapes=((5, 7), (12,)))
    rft.project_(params, anchors, 0.5)
    rft.deviation(params, anchors, "mars")
    leaves = [p.requires_grad_() for p in params]
    gamma = torch.tensor(0.5, device=device, requires_grad=True)
    sum(q.square().sum() for q in rft.project(leaves, anchors, gamma)).backward()
    kept = [StorageWeakRef(t.untyped_storage()) for t in (*params, *anchors)]
    assert not any(of.expired() for of in kept)
    del params, anchors, leaves
    assert all(of.expired() for of in kept)


def test_other_tensors_in_the_same_memory(prepared, device):
    """Another object of the same form is served by the same sweep. Another form is not."""
    arena, anchor = torch.randn(64, device=device), torch.randn(64, device=device)
    half = arena.to(torch.bfloat16)

    def takes(count, params, anchors):
        before = len(prepared)
        assert_deviation(params, anchors, "mars_rows")
        assert len(prepared) - before == count

    takes(1, [arena[:24].view(4, 6)], [anchor[:24].view(4, 6)])
    arena.mul_(2)
    takes(0, [arena[:24].view(4, 6).detach()], [anchor[:24].view(4, 6)])
    takes(1, [arena[:24].view(6, 4)], [anchor[:24].view(6, 4)])
    takes(1, [arena[:24].view(6, 4).T], [anchor[:24].view(6, 4).T])
    takes(1, [arena[8:32].view(4, 6)], [anchor[:24].view(4, 6)])
    takes(1, [arena[:24].view(4, 6)], [anchor[8:32].view(4, 6)])
    takes(1, [arena[:24].view(4, 6)], None)
    takes(1, [arena[:24].view(4, 6), arena[24:48].view(4, 6)], None)
    takes(1, [arena[:24].view(4, 6)], [arena[24:48].view(4, 6)])
    takes(1, [arena.view(torch.bfloat16)[:24].copy_(half[:24]).view(4, 6)], None)
    takes(0, [arena.view(torch.bfloat16)[:24].view(4, 6)], None)


def test_parameters_that_take_another_dtype(prepared, device):
    params, anchors = pair(device)
    params = [nn.Parameter(p) for p in params]
    for dtype, count in ((torch.float32, 1), (torch.bfloat16, 2), (torch.float32, 3)):
        for p in params:
            p.data = p.data.to(dtype, copy=True)
        assert_deviation(params, anchors, "l2")
        assert len(prepared) == count
        assert_deviation(params, anchors, "l2")
        assert len(prepared) == count


def test_the_sweep_that_was_not_used_for_longest_goes(prepared, device, monkeypatch):
    sweeps, rule = SweepCache(room=2), RULES["observe"]
    lists = [pair(device, seed)[0] for seed in range(3)]
    for k, count in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4), (1, 4), (2, 5)):
        found = sweeps.measure(rule, lists[k], None)["before"]
        want = torch.stack([p.double().square().sum() for p in lists[k]])
        torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
        assert len(prepared) == count


def test_anchors_in_another_layout_are_read_anew(prepared, device):
    """They are copied at each call, so no sweep on a copy may be kept."""
    param, anchor = torch.randn(4, 6, device=device), torch.randn(6, 4, device=device).T
    for _ in range(3):
        anchor.add_(1)
        assert_deviation([param], [anchor], "mars_rows")
        assert_projection([param], [anchor], 2.0, "mars_rows")


def test_gradients_in_another_layout_leave_no_copies(prepared, device):
    """A prepared sweep has a copy of each, and a kept one would keep it."""
    params, anchors = pair(device)
    for lies, kept in ((True, 1), (False, 0)):
        ball = projection.Ball(params, "l2", SweepCache())
        grads = [torch.ones_like(p) if lies else torch.ones((), device=device).expand(p.shape) for p in params]
        want = torch.stack([(p.double() - a).sum() for p, a in zip(params, anchors, strict=True)])
        for _ in range(2):
            torch.testing.assert_close(ball.dots(params, anchors, grads), want, rtol=1e-4, atol=1e-5)
        assert len(ball._sweeps._made._by_key) == kept


def test_gradients_of_other_dtypes_and_none(prepared, device):
    """A prepared sweep takes those of one dtype."""
    params, anchors = pair(device)
    ball = projection.Ball(params, "l2")
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        grads = [torch.full_like(p, 0.5, dtype=dtype) for p in params]
        want = torch.stack([(p.double() - a).sum() / 2 for p, a in zip(params, anchors, strict=True)])
        torch.testing.assert_close(ball.dots(params, anchors, grads), want, rtol=1e-4, atol=1e-5)
        assert_deviation(params, anchors, "l2")
    assert len(prepared) == 3


@pytest.mark.parametrize("norm", NORMS)
def test_results_are_the_callers(prepared, device, norm):
    params, anchors = pair(device)
    first = rft.deviation(params, anchors, norm)
    copies = [n.clone() for n in first]
    for p in params:
        p.mul_(3)
    rft.deviation(params, anchors, norm)
    assert all(map(torch.equal, first, copies))


def test_versions(prepared, device):
    """Only a pull counts as a write. So a projection's slope can be taken after its norms were asked for."""
    params, anchors = pair(device)
    gamma = torch.tensor(0.5, device=device, requires_grad=True)
    for _ in range(2):
        projected = rft.project(params, anchors, gamma)
        versions = [p._version for p in params]
        rft.deviation(params, anchors)
        assert [p._version for p in params] == versions
        sum(q.square().sum() for q in projected).backward()
        projected = rft.project(params, anchors, gamma)
        rft.project_(params, anchors, 0.1)
        assert all(p._version > v for p, v in zip(params, versions, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sum(q.square().sum() for q in projected).backward()


def test_a_sweep_from_inference_mode_serves_outside(prepared, device):
    params, anchors = pair(device)
    with torch.inference_mode():
        inside = [p.clone() for p in params]
        for tensors in (params, inside):
            assert_deviation(tensors, anchors, "mars")
            assert_projection(tensors, anchors, 3.0, "mars")
            assert_projection(tensors, anchors, 2.0, "mars")
    for tensors in (params, inside):
        assert_deviation(tensors, anchors, "mars")
        assert_projection(tensors, anchors, 1.0, "mars")
    assert len(prepared) == 4


def test_threads_take_turns(device, monkeypatch):
    """A backward pass has threads of its own, and a sweep that is kept has one table of results."""
    params, _ = pair(device)
    inside, overlaps, call = threading.Semaphore(1), [], no_step.NoStep.__call__

    def watched(self, *args, **kwargs):
        overlaps.append(not inside.acquire(blocking=False))
        threading.Event().wait(0.05)
        call(self, *args, **kwargs)
        inside.release()

    monkeypatch.setattr(no_step.NoStep, "__call__", watched)
    threads = [threading.Thread(target=rft.deviation, args=(params, None)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [False] * 3


def test_each_stream_has_its_own_and_a_graph_takes_any(prepared, device, monkeypatch):
    stream, captured = 1, False
    monkeypatch.setattr(sweep_cache, "_stream_on", lambda _: stream)
    monkeypatch.setattr(sweep_cache, "_in_capture", lambda _: captured)
    params, anchors = pair(device)
    sweeps, rule = SweepCache(room=2), RULES["observe_rows"]
    sweeps.measure(rule, params, anchors)
    stream = 2
    sweeps.measure(rule, params, anchors)
    assert len(prepared) == 2
    stream, captured = 3, True
    for _ in range(2):
        sweeps.measure(rule, params, anchors)
    assert len(prepared) == 2
    with pytest.raises(RuntimeError, match="make the same call once before the capture, with the same tensors"):
        sweeps.measure(rule, params, None)
    with pytest.raises(RuntimeError, match="once before the capture"):
        sweeps.lengths([1, 2], device)
    (kept,) = sweeps._captured
    captured = False
    for seed in (1, 2):
        sweeps.measure(rule, *pair(device, seed))
    assert kept not in sweeps._made._by_key.values()  # the graph's memory stays all the same
    assert sweeps._captured == [kept]


def test_what_was_not_prepared_changes_nothing_under_capture(prepared, device, monkeypatch):
    params, anchors = pair(device)
    before = [p.clone() for p in params]
    monkeypatch.setattr(sweep_cache, "_in_capture", lambda _: True)
    for call in (rft.project_, rft.interpolate_):
        with pytest.raises(RuntimeError, match="each anchor in the memory layout of its param"):
            call(params, anchors, 0.5)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
        rft.deviation(params, anchors, "mars")
    assert all(map(torch.equal, params, before))
    monkeypatch.undo()


def test_forms_are_told_apart(monkeypatch):
    """With the extension and without it. Objects, versions and gradients do not count."""
    base = torch.randn(24)
    same = [base.view(4, 6), nn.Parameter(base.view(4, 6)), base.view(4, 6).detach()]
    others = [
        base.view(6, 4), base.view(6, 4).T, base.view(2, 2, 6), base[:12].view(2, 6), base[12:].view(2, 6),
        base.clone().view(4, 6), base.view(torch.int32).view(4, 6), base.view(4, 6)[:, ::2],
    ]  # fmt: skip
    for missing in dict.fromkeys((native.MISSING, "no compiler")):
        monkeypatch.setattr(native, "MISSING", missing)
        assert len({forms([of]) for of in same}) == 1
        assert len({forms([of]) for of in (same[0], *others)}) == 1 + len(others)
        assert forms(same[:1], addresses=False) == forms([base.clone().view(4, 6)], addresses=False)
        assert forms(same) != forms(same[:2])
        assert forms([torch.ones(2), torch.nn.Buffer(torch.ones(2)), torch.ones(2).as_subclass(Other)]) is None


class Other(torch.Tensor):
    pass


@pytest.mark.parametrize("bad", [lambda p, a: (p, [*a[:-1], a[-1].flatten()]), lambda p, a: (p, a[:-1])])
def test_lists_that_passed_the_checks_vouch_for_no_others(device, bad):
    params, anchors = pair(device)
    for _ in range(2):
        rft.deviation(params, anchors)
        with pytest.raises(ValueError, match="anchor"):
            rft.deviation(*bad(params, anchors))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("norm", NORMS)
def test_places_of_shards_are_found_once(norm, request, monkeypatch):
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    request.addfinalizer(torch.distributed.destroy_process_group)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    made, init = [], Segments.__init__
    monkeypatch.setattr(Segments, "__init__", lambda self, *args: (made.append(self), init(self, *args))[1])
    params, anchors = (
        [distribute_tensor(t, mesh, [Shard(0)]) for t in of] for of in pair("cpu", shapes=((4, 3), (5,)))
    )
    counts = []
    for _ in range(3):
        rft.project_(params, anchors, 0.3, norm)
        found = rft.deviation(params, anchors, norm)
        for n, p, a in zip(found, params, anchors, strict=True):
            c = p.full_tensor().double() - a.full_tensor()
            torch.testing.assert_close(n, by_rows(c).abs().sum(1) if norm == "mars_rows" else norms_of(c, norm))
        counts.append(len(made))
    assert counts == [2, 2, 2]
