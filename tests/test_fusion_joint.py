"""Joint attention against one softmax over both token sets written out plainly; ties; what it asks of a twin."""

import copy
from dataclasses import replace

import pytest
import torch

from ovi.block import Block
from ovi.clock import Clock
from ovi.errors import OviError
from ovi.fusion import JointFusion
from ovi.layout import LatentLayout
from ovi.rope import ROPE_ALIGNMENTS
from ovi.stream import Control
from ovi.twin import num_parameters
from plain_pair import (
    AUDIO,
    VIDEO,
    close,
    cross_attention,
    feed_forwards,
    join,
    linear,
    modulations,
    norm,
    pair,
    randomise,
    rms,
    run,
    split,
    turn,
    without_exchange,
)
from small_twins import inputs, twin

SIZES = {
    "equal": ((48, 3), (48, 3)),
    "other widths": (VIDEO, AUDIO),
    "other heads": ((48, 3), (48, 4)),
}
sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
CONTROLS = [
    Control(),
    Control(0.0, 0.0),
    Control(1.0, 0.0),
    Control(0.0, 0.4),
    Control(0.3, 2.0),
    Control(torch.tensor([0.3, 1.0]), torch.tensor([0.0, 1.0])),
    Control(torch.tensor([0.0, 0.0]), 1.0),
]


def joint(p, **knobs):
    return randomise(JointFusion(p.video, p.audio, **knobs).to(p.v.tokens.dtype))


def self_attention(p, fusion, who, gate):
    """Every key counts: its own mask, and for the partner's the gate, which multiply its share of the softmax."""
    other = {"v": "a", "a": "v"}[who]
    blocks = {"v": p.video, "a": p.audio}
    block, own, partner = blocks[who], getattr(p, who), getattr(p, other)
    m = {name: modulations(blocks[name], getattr(p, name)) for name in blocks}
    x, y = (norm(s.tokens) * (1 + m[name][1]) + m[name][0] for name, s in ((who, own), (other, partner)))
    w, heads = block.self_attn, block.num_heads
    mine = p.angles[who]["own"]
    q, k = (turn(split(rms(n, linear(layer, x)), heads), mine) for n, layer in ((w.norm_q, w.q), (w.norm_k, w.k)))
    v = split(linear(w.v, x), heads)
    if fusion.equal:
        theirs, angles = blocks[other].self_attn, p.angles[other]["own"]
    else:
        theirs, angles = (fusion.video if who == "v" else fusion.audio), p.angles[who]["partner"]
    k_p = turn(split(rms(theirs.norm_k, linear(theirs.k, y)), heads), angles)
    v_p = split(linear(theirs.v, y), heads)
    counts = [torch.ones(2, s.tokens.shape[1]) if s.mask is None else s.mask for s in (own, partner)]
    gate = torch.as_tensor(gate, dtype=torch.float64).expand(2).view(2, 1)
    counts = torch.cat((counts[0].double(), counts[1] * gate), 1)[:, None, None]
    raw = q @ torch.cat((k, k_p), 2).transpose(-1, -2) / q.shape[-1] ** 0.5
    shares = counts.to(raw.dtype) * torch.exp(raw - raw.amax(-1, keepdim=True))
    result = shares @ torch.cat((v, v_p), 2) / shares.sum(-1, keepdim=True)
    if own.values_only is not None:
        result = torch.stack([v[b] if own.values_only[b] else result[b] for b in range(2)])
    return own.tokens + m[who][2] * linear(w.o, join(result))


def expected(p, fusion, control=None):
    control = control or Control()
    v, a = self_attention(p, fusion, "v", control.a2v), self_attention(p, fusion, "a", control.v2a)
    return feed_forwards(p, cross_attention(p.video, p.v, v), cross_attention(p.audio, p.a, a))


@sizes
@torch.no_grad()
def test_is_its_mathematics(sizes):
    p = pair(*sizes)
    fusion = joint(p)
    for control in CONTROLS:
        close(run(fusion, p, control), expected(p, fusion, control))
    p.a = replace(p.a, mask=None)  # nothing to mask: another way through the kernel
    for control in CONTROLS:
        got, wanted = run(fusion, p, control), expected(p, fusion, control)
        assert all((x - y).abs().max() < 1e-9 for x, y in zip(got, wanted))


@torch.no_grad()
def test_tied_is_its_mathematics():
    p = pair(*SIZES["equal"])
    fusion = joint(p, weights="tied")
    for control in CONTROLS:
        close(run(fusion, p, control), expected(p, fusion, control))


@sizes
@torch.no_grad()
def test_guidance_may_replace_self_attention_by_its_values(sizes):
    p = pair(*sizes)
    fusion = joint(p)
    p.v, p.a = (s.with_values_only(torch.tensor([False, True])) for s in (p.v, p.a))
    for control in CONTROLS:
        close(run(fusion, p, control), expected(p, fusion, control))


@sizes
@torch.no_grad()
def test_a_gate_of_zero_is_the_block_alone(sizes):
    p = pair(*sizes, dtype=torch.float32)
    fusion, none = JointFusion(p.video, p.audio), without_exchange(p)
    on = run(fusion, p)
    for control, off in (
        (Control(0.0, 0.0), (True, True)),
        (Control(1, 0.0), (False, True)),
        (Control(0, 1.0), (True, False)),
    ):
        for got, joined, alone, is_off in zip(run(fusion, p, control), on, none, off):
            assert torch.equal(got, alone) == is_off
            assert torch.equal(got, joined) != is_off
    for got, alone in zip(run(fusion, p, Control(torch.zeros(2), torch.zeros(2))), none):
        assert torch.allclose(got, alone, atol=1e-5)


@sizes
def test_a_gate_of_zero_in_a_tensor_trains_as_the_block_alone(sizes):
    """Scores of minus infinity leave no NaN behind, whether it is parameters, tokens or gates that are learnt."""

    def gradients(control):
        p = pair(*sizes)
        fusion = joint(p)
        p.v, p.a = (replace(s, tokens=s.tokens.requires_grad_()) for s in (p.v, p.a))
        video, audio = run(fusion, p, control)
        (video.square().mean() + audio[:, :3].square().mean()).backward()
        return fusion, [*p.video.parameters(), *p.audio.parameters(), p.v.tokens, p.a.tokens]

    gates = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.zeros(2, dtype=torch.float64)
    fusion, masked = gradients(Control(*gates))
    _, alone = gradients(Control(0.0, 0.0))
    for x, y in zip(masked, alone):
        assert (x.grad - y.grad).abs().max() < 1e-9
    assert gates[0].grad.isfinite().all()
    assert all((q.grad == 0).all() for q in fusion.parameters())


@torch.no_grad()
def test_equal_towers_share_one_set_of_keys():
    """Every key is turned and stored once, though it is met from both sides."""
    p = pair(*SIZES["equal"])
    met, kernel = [], p.video.attention

    def attention(q, k, v, mask=None):
        met.append((k, v, mask))
        return kernel(q, k, v, mask)

    p.video.attention = p.audio.attention = attention
    p.a = replace(p.a, mask=None)
    run(joint(p), p)
    joined = [call for call in met if call[0].shape[2] == 6 + 5]
    assert len(joined) == 2
    assert joined[0][0] is joined[1][0]
    assert joined[0][1] is joined[1][1]
    assert joined[0][2] is None


def count(video, audio, **knobs):
    with torch.device("meta"):
        blocks = torch.nn.ModuleList((Block(*video, 8), Block(*audio, 8)))
        apart = num_parameters(blocks)
        fusion = JointFusion(*blocks, **knobs)
    return num_parameters(fusion), num_parameters(blocks) - apart


@pytest.mark.parametrize(("video", "audio"), [((4096, 32), (2048, 16)), (VIDEO, AUDIO), ((48, 3), (48, 4))])
def test_parameters_of_adapters(video, audio):
    dims = video[0], audio[0]
    assert count(video, audio) == (4 * dims[0] * dims[1] + 3 * sum(dims), 0)


@pytest.mark.parametrize("size", [(3072, 24), (48, 3)])
def test_parameters_of_equal_towers(size):
    assert count(size, size) == (0, 0)
    assert count(size, size, weights="tied") == (0, -(8 * size[0] ** 2 + 14 * size[0]))


def tied_twin(seed=0):
    return twin(lambda v, a: JointFusion(v, a, weights="tied"), seed=seed)


def assert_tied(model):
    for v, a in zip(model.video.blocks, model.audio.blocks):
        assert v.self_attn is a.self_attn
        assert v.cross_attn is a.cross_attn
        assert v.norm3 is a.norm3
        shared = {id(q) for q in v.parameters()} & {id(q) for q in a.parameters()}
        assert len(shared) == 10 + 10 + 2
        assert all(x is not y for x, y in zip(v.ffn.parameters(), a.ffn.parameters()))
        assert v.modulation is not a.modulation


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_ties_hold_through_the_state(assign, tmp_path):
    model, other = tied_twin(), tied_twin(seed=3)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), assign=assign)
    assert_tied(other)
    for x, y in zip(other(*inputs()), model(*inputs())):
        assert torch.equal(x, y)


def test_ties_hold_when_copied_moved_and_trained():
    model = copy.deepcopy(tied_twin())
    assert_tied(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    video, audio = model(*inputs())
    (video.square().mean() + audio.square().mean()).backward()
    optimizer.step()
    assert_tied(model)
    model.to(torch.float64)
    assert_tied(model)
    assert_tied(model.to("meta").to_empty(device="cpu"))


@torch.no_grad()
def test_an_untied_state_leaves_the_audio_towers_weights():
    untied, model = twin("joint"), tied_twin(seed=3)
    model.load_state_dict(untied.state_dict())
    assert_tied(model)
    for block, theirs in zip(model.video.blocks, untied.audio.blocks):
        assert torch.equal(block.self_attn.q.weight, theirs.self_attn.q.weight)


@pytest.mark.parametrize(
    ("clock", "frames", "tokens"),
    [(Clock(), 31, 157), (Clock(fps=12, video_stride=1, causal_first_frame=False), 12, 31)],
)
@pytest.mark.parametrize("alignment", ["seconds", "ratio_audio"])
@pytest.mark.parametrize("audio_tower", [{}, {"dim": 36, "num_heads": 2}], ids=["equal", "unequal"])
@torch.no_grad()
def test_positions_in_a_model_are_those_of_the_clock(clock, frames, tokens, alignment, audio_tower):
    """Angles from the rates alone: video's by time, row and column, audio's by time."""
    layout = LatentLayout(4, 6, 8, 5, clock)
    model = twin("joint", alignment, layout, tower={"num_blocks": 1}, audio_tower=audio_tower)
    fusion, caught = model.fusions[0], []
    fusion.register_forward_hook(lambda module, args, result: caught.append((args, result)))
    video, audio, sigma, text, _ = inputs(frames=frames, tokens=tokens)
    model(video, audio, sigma, text, text)
    (v, a, *blocks, _), result = caught[0]

    stride = clock.video_stride
    first = 1 if clock.causal_first_frame else stride
    seconds = [(first / 2 if i == 0 else first + (i - 0.5) * stride) / clock.fps for i in range(frames)]
    units = stride / clock.fps if alignment == "seconds" else None
    times = {
        "v": [s / units if units else i * 31.25 * stride / clock.fps for i, s in enumerate(seconds)],
        "a": [(j + 0.5) / 31.25 / units if units else j for j in range(tokens)],
    }

    def angles(who, dim):
        """[L, d / 2]: the share of time, then of height and width, each 10000 to the -2i / share."""
        space = 2 * (dim // 6)
        shares = [dim - 2 * space, space, space]
        rates = [[10000 ** (-2 * i / share) for i in range(share // 2)] for share in shares]
        if who == "a":
            return torch.tensor([[t * r for r in rates[0]] + [0.0] * space for t in times["a"]])
        places = [(t, row, column) for t in times["v"] for row in range(2) for column in range(2)]
        return torch.tensor([[x * r for x, of in zip(place, rates) for r in of] for place in places])

    p = pair()
    p.video, p.audio = blocks
    p.v, p.a = v, a
    dims = {"v": model.video.head_dim, "a": model.audio.head_dim}
    p.angles = {
        who: {"own": angles(who, dims[who]), "partner": angles(other, dims[who])}
        for who, other in (("v", "a"), ("a", "v"))
    }
    for got, wanted in zip(result, expected(p, fusion)):
        assert (got.tokens - wanted).abs().max() < 5e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: JointFusion(Block(48, 3, 8), Block(48, 3, 8), weights="shared"), "weights=shared: expected untied, t"),
        (lambda: JointFusion(Block(48, 3, 8), Block(24, 2, 8), weights="tied"), "video of dim 48 with 3 heads and aud"),
        (lambda: JointFusion(Block(48, 3, 8), Block(48, 4, 8), weights="tied"), "audio of dim 48 with 4: set model.a"),
        (lambda: twin("joint", self_alignment=ROPE_ALIGNMENTS["none"]), "set model.self_alignment=null"),
        (lambda: twin("joint", audio_tower={"theta": 500.0}), "theta=10000 and model.audio.theta=500"),
    ],
)
def test_what_it_cannot_do_is_named(build, says):
    with pytest.raises(OviError, match=says):
        build()


def test_what_concerns_one_attention_concerns_no_other_fusion():
    twin("ovi", self_alignment=ROPE_ALIGNMENTS["none"], audio_tower={"theta": 500.0})
    twin("joint", audio_tower={"dim": 36, "theta": 500.0})
