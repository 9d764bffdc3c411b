"""LoRA adapters on a quantized base: answers equal PEFT's on the dequantized base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llava
from helpers.vllm_engine import engine
from safetensors.torch import save_file

pytest.importorskip("vllm")

TOKENS = 16
RANK, ALPHA = 8, 16
QUESTIONS = ("What is there?", "How many blobs are green?")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its decoder is one of which vLLM adapts output head and embedding, too."""
    return tiny_llava.build(tmp_path_factory.mktemp("lora") / "source", decoder="LlamaConfig")


Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module -> A [r, K] and B [N, r]."""


def make_adapter(
    source: Path, directory: Path, rank_stabilized: bool = False, vocabulary: bool = False
) -> Adapter:
    """An adapter of every decoder linear, or of output head and embedding, in PEFT's form."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    random = torch.Generator().manual_seed(3)
    tensors, adapter = {}, {}
    targets = ["lm_head", "embed_tokens"] if vocabulary else list(LINEARS)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in targets or "vision" in name:
            continue
        if isinstance(module, torch.nn.Embedding):
            a = torch.randn(RANK, module.num_embeddings, generator=random) * 0.1
            b = torch.randn(module.embedding_dim, RANK, generator=random) * 0.1
            tensors[f"base_model.model.{name}.lora_embedding_A"] = a
            tensors[f"base_model.model.{name}.lora_embedding_B"] = b
        else:
            a = torch.randn(RANK, module.in_features, generator=random) * 0.1
            b = torch.randn(module.out_features, RANK, generator=random) * 0.1
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
        if vocabulary:  # PEFT saves what it adapts there as well
            tensors[f"base_model.model.{name}.base_layer.weight"] = module.weight.detach()
        adapter[name] = a, b
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source),
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "use_rslora": rank_stabilized,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return adapter


def adapted(model: Any, adapter: Adapter, scale: float = ALPHA / RANK) -> Any:
    """y = base(x) + B A x * scale, as PEFT computes it: A sees x as it is, not quantized.

    scale: alpha / r, of rank-stabilized adapters alpha / sqrt(r).
    """
    for name, module in model.named_modules():
        if name in adapter:
            a, b = adapter[name]
            looks_up = isinstance(module, torch.nn.Embedding)
            module.register_forward_hook(
                lambda _, args, output, a=a, b=b, looks_up=looks_up: (
                    output + (a.T[args[0]] if looks_up else args[0] @ a.T) @ b.T * scale
                )
            )
    return model


def forced_logprobs(model: Any, source: Path, index: int, tokens: list[int]) -> torch.Tensor:
    """What `model` gives to `tokens` as the answer to a question."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(source)
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[index]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = dict(processor(text=[text], images=[tiny_llava.picture(index)], return_tensors="pt"))
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        logits = model(**inputs).logits[0, start - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize(
    ("scheme", "bits", "most"),
    # int8 rounding of activations makes steps of the last bits of a sum: weights that differ by
    # 1e-7 of themselves move the reference's own log-probabilities by 0.02.
    [
        ("w3a16", 16, 1e-4),
        pytest.param("w3a16", 8, 1e-4, marks=pytest.mark.slow),
        pytest.param("w4a8", 16, 5e-2, marks=pytest.mark.slow),
    ],
)
def test_logprobs_equal_peft_on_the_dequantized_base(
    source: Path, tmp_path: Path, scheme: str, bits: int, most: float, release: None
) -> None:
    """Requests with and without an adapter share a batch.

    bits: of output head and embedding; adapters of these fit where they have 16.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    checkpoint = tiny_llava.quantize(source, tmp_path / scheme, scheme, bits)
    adapter = make_adapter(source, tmp_path / "adapter")
    make_adapter(source, tmp_path / "stabilized", rank_stabilized=True)
    vocabulary = make_adapter(source, tmp_path / "vocabulary", vocabulary=True)
    llm = engine(
        checkpoint,
        dtype="float32",
        max_num_seqs=8,
        enable_lora=True,
        max_lora_rank=RANK,
        max_loras=3,
    )
    conversations = [
        tiny_llava.conversation(q, tiny_llava.picture(i)) for i, q in enumerate(QUESTIONS)
    ]
    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1)
    names = ["adapter", "stabilized", *(["vocabulary"] if bits == 16 else [])]
    requests = {
        name: LoRARequest(name, number, str(tmp_path / name))
        for number, name in enumerate(names, start=1)
    }
    used = [*requests, "base"]
    found = llm.chat(  # all in one batch
        [c for _ in used for c in conversations],
        parameters,
        use_tqdm=False,
        lora_request=[requests.get(name) for name in used for _ in conversations],
    )
    count = len(conversations)
    answers = {name: found[i * count : (i + 1) * count] for i, name in enumerate(used)}
    del llm
    base = tiny_llava.reference(source, checkpoint, torch.float32)
    models = {
        "base": base,
        "adapter": adapted(copy.deepcopy(base), adapter),
        "stabilized": adapted(copy.deepcopy(base), adapter, ALPHA / RANK**0.5),
        "vocabulary": adapted(copy.deepcopy(base), vocabulary),
    }
    others = {"adapter": "base", "stabilized": "adapter", "vocabulary": "base", "base": "adapter"}
    for name in used:
        other = others[name]
        for i, answer in enumerate(answers[name]):
            tokens = list(answer.outputs[0].token_ids)
            steps = zip(answer.outputs[0].logprobs, tokens, strict=True)
            ours = torch.tensor([step[token].logprob for step, token in steps])
            right = (ours - forced_logprobs(models[name], source, i, tokens)).abs().mean()
            wrong = (ours - forced_logprobs(models[other], source, i, tokens)).abs().mean()
            assert right < most and wrong > 10 * most, (name, i, right, wrong)
