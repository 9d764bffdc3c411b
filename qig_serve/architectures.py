"""The model families: one row of data each. Add a family here, and nowhere else.

family_row.py says what the fields are.
"""

from __future__ import annotations

from dataclasses import replace

from qig_serve.errors import UserError
from qig_serve.family_row import EXPERTS, Architecture, SmoothingGroup

_ROUTER = "mlp.gate"
_SHARED = ("mlp.shared_expert", "mlp.shared_expert_gate")


def _groups(mlp_norm: str, norm_offset: float = 0.0) -> tuple[SmoothingGroup, ...]:
    """A pre-norm block with gated MLP, as all families here have it."""
    q, k, v = (f"self_attn.{x}_proj" for x in "qkv")
    gate_up = ("mlp.gate_proj", "mlp.up_proj")
    return (
        SmoothingGroup("qkv", "input_layernorm", (q, k, v), "self_attn", "norm", norm_offset),
        SmoothingGroup("o", v, ("self_attn.o_proj",), "self_attn.o_proj", "linear"),
        SmoothingGroup("gate_up", mlp_norm, gate_up, "mlp", "norm", norm_offset),
        SmoothingGroup("down", "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj", "linear"),
    )


def _sparse(
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
            readers=(_ROUTER, *shared[1:]),
        ),
        *(_down_of(down, mlp) for mlp in shared[:1]),
        replace(_down_of(down, expert), name="experts_down"),
    )


def _experts_beside(groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
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


def _fused_gate_up(groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
    """The same where gate and up are one linear, gate first."""
    qkv, o, gate_up, down = groups
    fused = "mlp.gate_up_proj"
    return (
        qkv,
        o,
        replace(gate_up, linears=(fused,)),
        replace(down, previous=fused, part=(1, 2)),
    )


def _delta_net(groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
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


def _normed_values(groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
    """The same where values are normalized: nothing can be folded before o."""
    return tuple(replace(g, previous="", kind="none") if g.name == "o" else g for g in groups)


def _keys_as_values(groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
    """The same where attention has no v_proj: values are what k_proj gives."""
    qkv, *rest = groups
    return (replace(qkv, name="qk", linears=qkv.linears[:2]), *rest)


def _shared_keys(groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
    """The same where attention reads the keys and values of an earlier block."""
    qkv, *rest = groups
    return (replace(qkv, name="q", linears=qkv.linears[:1]), *rest)


def _lfm2(mixer: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
    """LFM2's names of a gated MLP, behind attention or a short convolution."""
    gate, up, down = (f"feed_forward.{w}" for w in ("w1", "w3", "w2"))
    return (
        *mixer,
        SmoothingGroup("gate_up", "ffn_norm", (gate, up), "feed_forward", "norm"),
        SmoothingGroup("down", up, (down,), down, "linear"),
    )


def _lfm2_attention() -> tuple[SmoothingGroup, ...]:
    q, k, v, out = (f"self_attn.{x}_proj" for x in ("q", "k", "v", "out"))
    qkv = SmoothingGroup("qkv", "operator_norm", (q, k, v), "self_attn", "norm")
    return qkv, SmoothingGroup("o", v, (out,), out, "linear")


def _lfm2_convolution() -> tuple[SmoothingGroup, ...]:
    """in_proj gives B, C and x; out_proj reads C times the convolution of B x."""
    into, out = "conv.in_proj", "conv.out_proj"
    first = SmoothingGroup("in", "operator_norm", (into,), "conv", "norm")
    return first, SmoothingGroup("out", into, (out,), out, "linear", part=(1, 3))


_PRE_NORM = _groups("post_attention_layernorm")
_QWEN3_5 = _groups("post_attention_layernorm", norm_offset=1.0)
_GEMMA4 = _normed_values(_groups("pre_feedforward_layernorm"))
_SHARED_KEYS = "blocks that read the keys and values of others"
_LLAVA_PREFIXES = ("language_model.model.layers.", "model.language_model.layers.")
_LEVELLED_TOWERS = ("clip_vision_model", "siglip_vision_model")
_PLAIN_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
_QWEN_PREFIXES = ("model.layers.", "model.language_model.layers.")

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            "llava",
            "model.language_model",
            _LLAVA_PREFIXES,
            _PRE_NORM,
            "LlavaForConditionalGeneration",
            "grid",
            text_types=_PLAIN_DECODERS,
            levelled_towers=_LEVELLED_TOWERS,
        ),
        Architecture(
            "llava_next",
            "model.language_model",
            _LLAVA_PREFIXES,
            _PRE_NORM,
            "LlavaNextForConditionalGeneration",
            "anyres",
            "LLaVA-1.6: tiles, and a newline token after each row",
            _PLAIN_DECODERS,
            levelled_towers=_LEVELLED_TOWERS,
        ),
        Architecture(
            "llava_onevision",
            "model.language_model",
            _LLAVA_PREFIXES,
            _PRE_NORM,
            "LlavaOnevisionForConditionalGeneration",
            "anyres",
            "tiles, and a newline token after each row",
            _PLAIN_DECODERS,
            levelled_towers=_LEVELLED_TOWERS,
        ),
        Architecture(
            "qwen2_vl",
            "model.language_model",
            _QWEN_PREFIXES,
            _PRE_NORM,
            "Qwen2VLForConditionalGeneration",
            "merged",
            "M-RoPE",
        ),
        Architecture(
            "qwen2_5_vl",
            "model.language_model",
            _QWEN_PREFIXES,
            _PRE_NORM,
            "Qwen2_5_VLForConditionalGeneration",
            "merged",
            "M-RoPE",
        ),
        Architecture(
            "qwen3_vl",
            "model.language_model",
            ("model.language_model.layers.",),
            _PRE_NORM,
            "Qwen3VLForConditionalGeneration",
            "merged",
            "M-RoPE, q and k norms, vision features added after early blocks",
        ),
        Architecture(
            "qwen3_vl_moe",
            "model.language_model",
            ("model.language_model.layers.",),
            _sparse(_PRE_NORM),
            "Qwen3VLMoeForConditionalGeneration",
            "merged",
            "as qwen3_vl, with experts",
            kept=(_ROUTER,),
            refused=(("mlp_only_layers", "blocks without experts between those with them"),),
            assumed=(("norm_topk_prob", True),),
        ),
        Architecture(
            "internvl",
            "model.language_model",
            _LLAVA_PREFIXES,
            _PRE_NORM,
            "InternVLForConditionalGeneration",
            "tiles",
            "the Hugging Face port of InternVL 2.5, 3 and 3.5",
            _PLAIN_DECODERS,
            splits_tower=False,
        ),
        Architecture(
            "gemma3",
            "model.language_model",
            _LLAVA_PREFIXES,
            _groups("pre_feedforward_layernorm", norm_offset=1.0),
            "Gemma3ForConditionalGeneration",
            "pooled",
            "(1 + w) norms, norms after attention and MLP, sliding windows",
            levelled_towers=_LEVELLED_TOWERS,
        ),
        Architecture(
            "idefics3",
            "model.text_model",
            ("model.text_model.layers.",),
            _PRE_NORM,
            "Idefics3ForConditionalGeneration",
            "split",
            text_types=_PLAIN_DECODERS,
        ),
        Architecture(
            "smolvlm",
            "model.text_model",
            ("model.text_model.layers.",),
            _PRE_NORM,
            "SmolVLMForConditionalGeneration",
            "split",
            text_types=_PLAIN_DECODERS,
        ),
        Architecture(
            "mistral3",
            "model.language_model",
            _LLAVA_PREFIXES,
            _PRE_NORM,
            "Mistral3ForConditionalGeneration",
            "sized",
            "Mistral Small 3.1 and 3.2, Ministral 3",
            ("mistral", "ministral3"),
        ),
        Architecture(
            "glm4v",
            "model.language_model",
            ("model.language_model.layers.",),
            _fused_gate_up(_PRE_NORM),
            "Glm4vForConditionalGeneration",
            "merged",
            "M-RoPE, gate and up in one linear, norms after both",
        ),
        Architecture(
            "qwen3_5",
            "model.language_model",
            ("model.language_model.layers.",),
            _QWEN3_5,
            "Qwen3_5ForConditionalGeneration",
            "merged",
            "3.5 to 3.8: gated delta-net, (1 + w) norms, gate in q_proj",
            other_groups=(_delta_net(_QWEN3_5),),
            kept=("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
            embedding_as_is=True,
            on_cpu="gated delta-net in bfloat16 only, and no speculation",
        ),
        Architecture(
            "qwen3_5_moe",
            "model.language_model",
            ("model.language_model.layers.",),
            _sparse(_QWEN3_5, _SHARED),
            "Qwen3_5MoeForConditionalGeneration",
            "merged",
            "as qwen3_5, with experts, and one that sees every token",
            other_groups=(_delta_net(_sparse(_QWEN3_5, _SHARED)),),
            kept=(
                _ROUTER,
                "mlp.shared_expert_gate",
                "linear_attn.in_proj_a",
                "linear_attn.in_proj_b",
            ),
            embedding_as_is=True,
            on_cpu="gated delta-net in bfloat16 only, and no speculation",
        ),
        Architecture(
            "minicpmv4_6",
            "model.language_model",
            ("model.language_model.layers.",),
            _QWEN3_5,
            "MiniCPMV4_6ForConditionalGeneration",
            "sliced",
            "a qwen3_5 decoder, image tokens in a row",
            ("qwen3_5_text",),
            other_groups=(_delta_net(_QWEN3_5),),
            kept=("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
            embedding_as_is=True,
            on_cpu="gated delta-net in bfloat16 only, and no speculation",
        ),
        Architecture(
            "gemma4",
            "model.language_model",
            ("model.language_model.layers.",),
            _GEMMA4,
            "Gemma4ForConditionalGeneration",
            "placed",
            "31B; 26B-A4B: experts beside an MLP; E2B, E4B: shared keys",
            other_groups=(
                _keys_as_values(_GEMMA4),
                _experts_beside(_GEMMA4),
                _keys_as_values(_experts_beside(_GEMMA4)),
                _shared_keys(_GEMMA4),
            ),
            kept=("router.proj", "per_layer_input_gate", "per_layer_projection"),
            together=(("enable_moe_block", "num_experts"),),
            unread=tuple(f"self_attn.{x}.weight" for x in ("k_proj", "v_proj", "k_norm")),
            on_cpu="attention inside a picture is causal: compared without pictures' own mask",
        ),
        Architecture(
            "gemma4_unified",
            "model.language_model",
            ("model.language_model.layers.",),
            _GEMMA4,
            "Gemma4UnifiedForConditionalGeneration",
            "pieces",
            "12B: as gemma4, without a vision tower",
            other_groups=(_keys_as_values(_GEMMA4),),
            renamed=(
                ("model.embed_vision.multimodal_embedder.", "model.embed_vision."),
                ("model.embed_vision.patch_", "model.vision_embedder.patch_"),
                ("model.embed_vision.pos_", "model.vision_embedder.pos_"),
            ),
            on_cpu="attention inside a picture is causal: compared without pictures' own mask",
            refused=(("num_kv_shared_layers", _SHARED_KEYS),),
        ),
        Architecture(
            "lfm2_vl",
            "model.language_model",
            ("model.language_model.layers.",),
            _lfm2(_lfm2_attention()),
            "Lfm2VLForConditionalGeneration",
            "cut",
            "short convolutions between blocks of attention",
            ("lfm2",),
            other_groups=(_lfm2(_lfm2_convolution()),),
            embedding_as_is=True,
            levelled_towers=("siglip2_vision_model",),
        ),
    )
}


def get_architecture(model_type: str) -> Architecture:
    """The row of a `model_type`; UserError with the known ones otherwise."""
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        raise UserError(
            f"models of type {model_type!r} are not supported; known types: "
            + ", ".join(sorted(ARCHITECTURES))
        ) from None
