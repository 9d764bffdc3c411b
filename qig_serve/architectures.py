"""The model families: one row of data each. Add a family here, and nowhere else.

family_row.py says what the fields are, family_groups.py what groups there are.
"""

from __future__ import annotations

from dataclasses import replace

from qig_serve.errors import UserError
from qig_serve.family_groups import (
    ROUTER,
    SHARED_EXPERT,
    delta_net,
    experts_beside,
    fused_gate_up,
    gated_output,
    keys_as_values,
    lfm2,
    lfm2_attention,
    lfm2_convolution,
    pre_norm,
    shared_keys,
    sparse,
    without_previous,
)
from qig_serve.family_row import Architecture

_PRE_NORM = pre_norm("post_attention_layernorm")
_QWEN3_5 = pre_norm("post_attention_layernorm", norm_offset=1.0)
_GEMMA4 = without_previous(pre_norm("pre_feedforward_layernorm"), "o")  # values are normalized
_SHARED_KEYS = "blocks that read the keys and values of others"
_LLAVA_PREFIXES = ("language_model.model.layers.", "model.language_model.layers.")
_LEVELLED_TOWERS = ("clip_vision_model", "siglip_vision_model")
_PLAIN_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
_QWEN_PREFIXES = ("model.layers.", "model.language_model.layers.")
_MINICPMV4_6 = Architecture(
    "minicpmv4_6",
    "model.language_model",
    ("model.language_model.layers.",),
    _QWEN3_5,
    "MiniCPMV4_6ForConditionalGeneration",
    "sliced",
    "a qwen3_5 decoder, image tokens in a row",
    ("qwen3_5_text",),
    other_groups=(delta_net(_QWEN3_5),),
    kept=("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
    embedding_as_is=True,
    on_cpu="gated delta-net in bfloat16 only, and no speculation",
)

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
            "LLaVA 1.5; Pixtral 12B: its tower, rows that end in a token",
            _PLAIN_DECODERS,
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
            sparse(_PRE_NORM),
            "Qwen3VLMoeForConditionalGeneration",
            "merged",
            "as qwen3_vl, with experts",
            kept=(ROUTER,),
            refused=(("mlp_only_layers", "blocks without experts between those with them"),),
            assumed=(("text_config.norm_topk_prob", True),),
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
            pre_norm("pre_feedforward_layernorm", norm_offset=1.0),
            "Gemma3ForConditionalGeneration",
            "pooled",
            "(1 + w) norms, norms after attention and MLP, sliding windows",
            refused=(("use_bidirectional_attention", "attention to the tokens that follow"),),
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
            fused_gate_up(_PRE_NORM),
            "Glm4vForConditionalGeneration",
            "merged",
            "M-RoPE, gate and up in one linear, norms after both",
        ),
        Architecture(
            "glm_ocr",
            "model.language_model",
            ("model.language_model.layers.",),
            fused_gate_up(_PRE_NORM),
            "GlmOcrForConditionalGeneration",
            "merged",
            "as glm4v, for documents",
        ),
        Architecture(
            "glm4v_moe",
            "model.language_model",
            ("model.language_model.layers.",),
            sparse(_PRE_NORM, ("mlp.shared_experts",)),
            "Glm4vMoeForConditionalGeneration",
            "merged",
            "GLM-4.5V, 4.6V: experts by sigmoids, one that sees every token",
            other_groups=(_PRE_NORM,),
            kept=(ROUTER,),
            embedding_as_is=True,
            assumed=(("text_config.use_qk_norm", False),),
        ),
        Architecture(
            "qwen3_5",
            "model.language_model",
            ("model.language_model.layers.",),
            _QWEN3_5,
            "Qwen3_5ForConditionalGeneration",
            "merged",
            "3.5 to 3.8: gated delta-net, (1 + w) norms, gate in q_proj",
            other_groups=(delta_net(_QWEN3_5),),
            kept=("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
            embedding_as_is=True,
            on_cpu="gated delta-net in bfloat16 only, and no speculation",
        ),
        Architecture(
            "qwen3_5_moe",
            "model.language_model",
            ("model.language_model.layers.",),
            sparse(_QWEN3_5, SHARED_EXPERT),
            "Qwen3_5MoeForConditionalGeneration",
            "merged",
            "as qwen3_5, with experts, and one that sees every token",
            other_groups=(delta_net(sparse(_QWEN3_5, SHARED_EXPERT)),),
            kept=(
                ROUTER,
                "mlp.shared_expert_gate",
                "linear_attn.in_proj_a",
                "linear_attn.in_proj_b",
            ),
            embedding_as_is=True,
            on_cpu="gated delta-net in bfloat16 only, and no speculation",
        ),
        _MINICPMV4_6,
        replace(
            _MINICPMV4_6,
            name="minicpmv4_7",
            vllm_class="MiniCPMV4_7ForConditionalGeneration",
            note="as minicpmv4_6, M-RoPE over the whole picture",
            assumed=(("uses_mrope_canvas", True),),
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
                keys_as_values(_GEMMA4),
                experts_beside(_GEMMA4),
                keys_as_values(experts_beside(_GEMMA4)),
                shared_keys(_GEMMA4),
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
            other_groups=(keys_as_values(_GEMMA4),),
            renamed=(
                ("model.embed_vision.multimodal_embedder.", "model.embed_vision."),
                ("model.embed_vision.patch_", "model.vision_embedder.patch_"),
                ("model.embed_vision.pos_", "model.vision_embedder.pos_"),
            ),
            on_cpu="attention inside a picture is causal: compared without pictures' own mask",
            refused=(("num_kv_shared_layers", _SHARED_KEYS),),
        ),
        Architecture(
            "exaone4_5",
            "model.language_model",
            ("model.language_model.layers.",),
            without_previous(_PRE_NORM, "qkv", "gate_up"),
            "Exaone4_5_ForConditionalGeneration",
            "merged",
            "norms behind attention and MLP alone, sliding windows",
            ("exaone4",),
        ),
        Architecture(
            "paddleocr_vl",
            "model.language_model",
            ("model.layers.",),
            _PRE_NORM,
            "PaddleOCRVLForConditionalGeneration",
            "merged",
            "M-RoPE, ERNIE 4.5's decoder",
            renamed=(
                ("model.projector.", "mlp_AR."),
                ("model.visual.", "visual."),
                ("model.language_model.", "model."),
            ),
            on_cpu="tower's positions are interpolated otherwise: compared with a single one",
        ),
        Architecture(
            "muse_glimmer",
            "model.language_model",
            ("model.language_model.layers.",),
            gated_output(pre_norm("pre_feedforward_layernorm", norm_offset=1.0)),
            "MuseGlimmerForCausalLM",
            "merged",
            "(1 + w) norms, gate of attention's output, sliding windows",
            embedding_as_is=True,
        ),
        Architecture(
            "lfm2_vl",
            "model.language_model",
            ("model.language_model.layers.",),
            lfm2(lfm2_attention()),
            "Lfm2VLForConditionalGeneration",
            "cut",
            "short convolutions between blocks of attention",
            ("lfm2",),
            other_groups=(lfm2(lfm2_convolution()),),
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
