"""Smoothing groups of decoder blocks, from which the rows of architectures.py take theirs."""

from __future__ import annotations

from dataclasses import replace

from qig_serve.family_row import EXPERTS, SmoothingGroup

ROUTER = "mlp.gate"
SHARED_EXPERT = ("mlp.shared_expert", "mlp.shared_expert_gate")


def pre_norm(mlp_norm: str, norm_offset: float = 0.0) -> tuple[SmoothingGroup, ...]:
    """A pre-norm block with gated MLP, as all families here have it."""
    q, k, v = (f"self_attn.{x}_proj" for x in "qkv")
    gate_up = ("mlp.gate_proj", "mlp.up_proj")
    return (
        SmoothingGroup("qkv", "input_layernorm", (q, k, v), "self_attn", "norm", norm_offset),
        SmoothingGroup("o", v, ("self_attn.o_proj",), "self_attn.o_proj", "linear"),
        SmoothingGroup("gate_up", mlp_norm, gate_up, "mlp", "norm", norm_offset),
        SmoothingGroup("down", "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj", "linear"),
    )


def sparse(
    groups: tuple[SmoothingGroup, ...], shared: tuple[str, ...] = ()
) -> tuple[SmoothingGroup, ...]:
    """The same with experts in the place of the MLP; shared: of an expert that sees every token,
    its path and that of its gate."""
    *mixer, gate_up, down = groups
    expert = f"mlp.{EXPERTS}.*"
    mlps = (expert, *shared[:1])
    return (
        *mixer,
        replace(
            gate_up,
            linears=tuple(f"{mlp}.{x}_proj" for mlp in mlps for x in ("gate", "up")),
            readers=(ROUTER, *shared[1:]),
        ),
        *(_down_of(down, mlp) for mlp in shared[:1]),
        replace(_down_of(down, expert), name="experts_down"),
    )


def experts_beside(groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
    """The same with experts beside the MLP, behind a norm that nothing else reads.

    The router has a norm of its own.
    """
    *_, gate_up, down = groups
    expert = f"{EXPERTS}.*"
    return (
        *groups,
        replace(
            gate_up,
            name="experts_gate_up",
            previous="pre_feedforward_layernorm_2",
            linears=(f"{expert}.gate_proj", f"{expert}.up_proj"),
            loss_module=EXPERTS,
        ),
        replace(_down_of(down, expert), name="experts_down"),
    )


def _down_of(group: SmoothingGroup, mlp: str) -> SmoothingGroup:
    down = f"{mlp}.down_proj"
    return replace(group, previous=f"{mlp}.up_proj", linears=(down,), loss_module=down)


def fused_gate_up(groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
    """The same where gate and up are one linear, gate first."""
    qkv, o, gate_up, down = groups
    fused = "mlp.gate_up_proj"
    return (
        qkv,
        o,
        replace(gate_up, linears=(fused,)),
        replace(down, previous=fused, part=(1, 2)),
    )


def delta_net(groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
    """The same with gated delta-net in the place of attention; its small projections stay."""
    qkv, _, *mlp = groups
    q, z, b, a, out, norm = (
        f"linear_attn.{x}"
        for x in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "norm")
    )
    return (
        replace(qkv, name="qkvz", linears=(q, z), loss_module="linear_attn", readers=(b, a)),
        SmoothingGroup("out", norm, (out,), out, "norm"),  # one weight for all heads
        *mlp,
    )


def gated_output(groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
    """The same where a linear beside q, k and v gives a gate of attention's output."""
    qkv, *rest = groups
    return (replace(qkv, linears=(*qkv.linears, "self_attn.gate_proj")), *rest)


def without_previous(groups: tuple[SmoothingGroup, ...], *names: str) -> tuple[SmoothingGroup, ...]:
    """The same where nothing can be folded before the groups of these names."""
    return tuple(replace(g, previous="", kind="none") if g.name in names else g for g in groups)


def keys_as_values(groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
    """The same where attention has no v_proj: values are what k_proj gives."""
    qkv, *rest = groups
    return (replace(qkv, name="qk", linears=qkv.linears[:2]), *rest)


def shared_keys(groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
    """The same where attention reads the keys and values of an earlier block."""
    qkv, *rest = groups
    return (replace(qkv, name="q", linears=qkv.linears[:1]), *rest)


def lfm2(mixer: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
    """LFM2's names of a gated MLP, behind attention or a short convolution."""
    gate, up, down = (f"feed_forward.{w}" for w in ("w1", "w3", "w2"))
    return (
        *mixer,
        SmoothingGroup("gate_up", "ffn_norm", (gate, up), "feed_forward", "norm"),
        SmoothingGroup("down", up, (down,), down, "linear"),
    )


def lfm2_attention() -> tuple[SmoothingGroup, ...]:
    q, k, v, out = (f"self_attn.{x}_proj" for x in ("q", "k", "v", "out"))
    qkv = SmoothingGroup("qkv", "operator_norm", (q, k, v), "self_attn", "norm")
    return qkv, SmoothingGroup("o", v, (out,), out, "linear")


def lfm2_convolution() -> tuple[SmoothingGroup, ...]:
    """in_proj gives B, C and x; out_proj reads C times the convolution of B x."""
    into, out = "conv.in_proj", "conv.out_proj"
    first = SmoothingGroup("in", "operator_norm", (into,), "conv", "norm")
    return first, SmoothingGroup("out", into, (out,), out, "linear", part=(1, 3))
