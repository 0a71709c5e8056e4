"""torch.distributed.checkpoint in one process: every form of a state dict resumes bit for bit, and looking changes
nothing. test_spread.py has several processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)

import robustft_kernels as rft

# torch 2.10's own, in dcp.save
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


@pytest.fixture(autouse=True)
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 3))


def step(model, optimizer, t):
    for k, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) + 0.3 * t
    optimizer.step()
    optimizer.zero_grad()


FORMS = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full, on the CPU": {"full_state_dict": True, "cpu_offload": True},
    "full, from rank 0": {"full_state_dict": True, "broadcast_from_rank0": True},
}
OPTIMIZERS = {
    "spd": lambda m, **own: rft.AdamSPD(m.parameters(), lr=1e-2, **own),
    "ftp": lambda m, **own: rft.AdamFTP(m.parameters(), lr=1e-2, **own),
    "bf16 moments": lambda m, **own: rft.AdamSPD(m.parameters(), lr=1e-2, state_dtype="bfloat16", **own),
    "8-bit moments": lambda m, **own: rft.AdamSPD(m.parameters(), lr=1e-2, state_dtype="8bit", **own),
    "pgm, zero anchor": lambda m, **_: rft.AdamPGM(m.parameters(), lr=1e-2, radius=0.1, anchor="zero"),
    "l2sp, sgd": lambda m, **own: rft.SGDL2SP(m.parameters(), lr=1e-2, momentum=0.9, **own),
    "around": lambda m, **own: rft.Anchored(
        torch.optim.AdamW(m.parameters(), lr=1e-2), method="project", radius=0.01, **own
    ),
}


@pytest.mark.parametrize("save_anchors", [True, False, "digest"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_form_resumes(name, form, save_anchors):
    """Into a fresh optimizer over the weights as they were at first, or, when the checkpoint has the anchors, over the
    trained ones; the next steps are the same bits."""
    if save_anchors == "digest" and name == "around":
        pytest.skip("Anchored saves its anchors or does not")
    options = StateDictOptions(**FORMS[form])
    model, other = model_of(), model_of()
    optimizer = OPTIMIZERS[name](model, save_anchors=save_anchors)
    resumed = None if save_anchors is True else OPTIMIZERS[name](other, save_anchors=save_anchors)
    for t in range(3):
        step(model, optimizer, t)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other.load_state_dict(model.state_dict())
    resumed = resumed or OPTIMIZERS[name](other)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    for t in range(3, 5):
        step(model, optimizer, t)
        step(other, resumed, t)
        assert all(map(torch.equal, model.parameters(), other.parameters())), t
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert set(optimizer.state[p]) - {"anchor_digest"} == set(resumed.state[q]) - {"anchor_digest"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_looking_at_a_fresh_optimizer_makes_no_step(name, form):
    model = model_of()
    untouched = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS[name](model)
    _, saved = get_state_dict(model, optimizer, options=StateDictOptions(**FORMS[form]))
    assert saved
    for key, weights in model.state_dict().items():
        assert torch.equal(weights, untouched[key]), key
    if name != "around":  # which begins the wrapped one as torch does
        assert all(float(of.get("step", 0)) == 0 for of in optimizer.state.values())
    assert all(p.grad is None for p in model.parameters())


def test_a_digest_in_a_flattened_checkpoint_is_compared():
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, other = model_of(), model_of()
    optimizer = rft.AdamSPD(model.parameters(), save_anchors="digest")
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    wrong = rft.AdamSPD(other.parameters(), save_anchors="digest")
    with pytest.raises(ValueError, match=r"the anchor of parameter 0 .* is not the one"):
        set_optimizer_state_dict(other, wrong, saved, options=options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["spd", "around"])
def test_every_form_carries_the_digests_and_is_held_to_them(name, form):
    """A checkpoint without digests still loads, over other anchors too."""
    options = StateDictOptions(**FORMS[form])
    model, other = model_of(), model_of()
    optimizer = OPTIMIZERS[name](model)
    step(model, optimizer, 0)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    of_weight = saved if "flattened" in form else saved["state"]["0.weight"]
    prefix = "state.0.weight." if "flattened" in form else ""
    of_weight[f"{prefix}anchor"].view(torch.int32)[3, 3] ^= 4
    with torch.no_grad():
        other[0].weight.add_(1)
    with pytest.raises(ValueError, match=r"the checkpoint's anchor of parameter 0 .* is damaged"):
        set_optimizer_state_dict(other, resumed := OPTIMIZERS[name](other), saved, options=options)
    for place in [saved] if "flattened" in form else saved["state"].values():
        for key in [key for key in place if key.endswith("anchor_digest")]:
            del place[key]
    set_optimizer_state_dict(other, resumed := OPTIMIZERS[name](other), saved, options=options)
    assert torch.equal(resumed.state[other[0].weight]["anchor"], of_weight[f"{prefix}anchor"])


@pytest.mark.parametrize("name", ["spd", "around"])
def test_what_is_loaded_in_place_is_held_to_its_digest(name, tmp_path):
    """Over other anchors, over anchors of another dtype, and from a checkpoint that has no digests."""
    model = model_of().bfloat16().float()
    optimizer = OPTIMIZERS[name](model)
    step(model, optimizer, 0)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "whole")
    saved["state"]["0.bias"]["anchor"][1] += 1
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "damaged")
    for of in saved["state"].values():
        del of["anchor_digest"]
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "without")

    def load(folder, **planned):
        other = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 3))  # its anchors are other numbers, in float32
        resumed = OPTIMIZERS[name](other)
        content = {"optimizer": get_optimizer_state_dict(other, resumed)}
        dcp.load(content, checkpoint_id=tmp_path / folder, planner=dcp.DefaultLoadPlanner(**planned))
        set_optimizer_state_dict(other, resumed, content["optimizer"])
        return resumed.state[other[0].weight]["anchor"]

    assert torch.equal(load("whole").float(), optimizer.state[model[0].weight]["anchor"].float())
    with pytest.raises(ValueError, match=r"the checkpoint's anchor of parameter 1 .* is damaged"):
        load("damaged")
    load("without", allow_partial_load=True)


def test_an_anchor_that_was_rounded_in_loading_is_refused(tmp_path):
    model, other = model_of(), model_of().bfloat16().float()
    optimizer, resumed = (rft.AdamSPD(m.parameters()) for m in (model, other))
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    content = {"optimizer": get_optimizer_state_dict(other, resumed)}
    dcp.load(content, checkpoint_id=tmp_path)
    with pytest.raises(
        ValueError, match=r"rounded: it was loaded into torch\.bfloat16; make .* anchor_dtype=torch\.float32"
    ):
        set_optimizer_state_dict(other, resumed, content["optimizer"])


def test_loading_in_place_spares_given_anchors_and_compares_digests():
    """torch.distributed.checkpoint.load writes into the tensors of `state_dict`."""
    model = model_of()
    given = [p.detach().clone() for p in model.parameters()]
    untouched = [t.clone() for t in given]
    optimizer = rft.AdamSPD(model.parameters(), anchor=given)
    around = rft.Anchored(torch.optim.SGD(model.parameters()), anchor=given)
    for of in (optimizer, around):
        handed_out = of.state_dict()
        for kept in handed_out["state"].values():
            kept["anchor"].add_(1)
        of.load_state_dict(handed_out)
        assert all(map(torch.equal, given, untouched))
        assert all(torch.equal(of.state[p]["anchor"], t + 1) for p, t in zip(model.parameters(), given, strict=True))
    digests = rft.AdamSPD(model.parameters(), anchor=given, save_anchors="digest")
    handed_out = digests.state_dict()
    handed_out["state"][0]["anchor_digest"].add_(1)
    with pytest.raises(ValueError, match=r"the anchor of parameter 0 .* is not the one"):
        digests.load_state_dict(handed_out)
