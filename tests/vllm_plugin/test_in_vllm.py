"""vLLM on a packed checkpoint against Hugging Face with the same dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llava
from helpers.vllm_engine import engine

pytest.importorskip("vllm")

SCHEMES = ("w3a16", "w4a8")
TOKENS = 20
QUESTIONS = ("What is there?", "How many blobs are green, and where are they in the picture?", "?")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava.build(tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture(scope="module")
def checkpoints(source: Path) -> dict[str, Path]:
    return {s: tiny_llava.quantize(source, source.parent / s, s) for s in SCHEMES}


def ask(llm: Any, logprobs: int | None = None) -> list[Any]:
    """Greedy answers about three pictures, one completion each."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=logprobs
    )
    conversations = [
        tiny_llava.conversation(q, tiny_llava.picture(i)) for i, q in enumerate(QUESTIONS)
    ]
    answers = llm.chat(conversations, parameters, use_tqdm=False)
    return [answer.outputs[0] for answer in answers]


def prompt(source: Path, index: int) -> dict[str, torch.Tensor]:
    """The same conversation through Hugging Face's processor."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(source)
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[index]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return processor(images=tiny_llava.picture(index), text=text, return_tensors="pt")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fp32_tokens_equal(
    source: Path, checkpoints: dict[str, Path], scheme: str, release: None
) -> None:
    model = tiny_llava.reference(source, checkpoints[scheme], torch.float32)
    expected = []
    for i in range(len(QUESTIONS)):
        inputs = prompt(source, i)
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
            )
        expected.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    llm = engine(checkpoints[scheme], dtype="float32")
    answers = ask(llm)
    del llm
    assert [list(a.token_ids) for a in answers] == expected
    assert len({tuple(e) for e in expected}) == len(expected)  # the pictures matter


@pytest.mark.parametrize(
    ("scheme", "compiled"),
    [
        pytest.param("w3a16", False, marks=pytest.mark.slow, id="w3a16-eager"),
        pytest.param("w3a16", True, id="w3a16-compiled"),
        pytest.param("w4a8", True, id="w4a8-compiled"),
    ],
)
def test_bf16_logprobs_within_noise(
    source: Path,
    checkpoints: dict[str, Path],
    scheme: str,
    compiled: bool,
    release: None,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """The fast kernels are as near to fp32 as Hugging Face's own bf16 run is.

    Compiled is as vLLM does it where there is no C++ compiler: traced, and run by eager kernels.
    """
    monkeypatch.setenv("CXX", "no-such-compiler")
    request.addfinalizer(lambda: torch.compiler.set_stance("default"))
    llm = engine(checkpoints[scheme], dtype="bfloat16", enforce_eager=not compiled)
    answers = ask(llm, logprobs=1)
    del llm
    exact = tiny_llava.reference(source, checkpoints[scheme], torch.float32)
    half = tiny_llava.reference(source, checkpoints[scheme], torch.bfloat16)
    ours, theirs = [], []
    for i, answer in enumerate(answers):
        tokens = list(answer.token_ids)
        chosen = [step[t].logprob for step, t in zip(answer.logprobs, tokens, strict=True)]
        wanted = forced_logprobs(exact, source, i, tokens)
        ours.append((torch.tensor(chosen) - wanted).abs())
        theirs.append((forced_logprobs(half, source, i, tokens) - wanted).abs())
    our, their = torch.cat(ours), torch.cat(theirs)
    print(
        f"{scheme}: logprobs differ from fp32 by {our.mean():.4f} (max {our.max():.4f}), "
        f"Hugging Face's bf16 by {their.mean():.4f} (max {their.max():.4f})"
    )
    assert our.mean() < 2e-2
    assert our.mean() < 1.5 * their.mean()


@pytest.mark.parametrize("scheme", [pytest.param("w3a16", marks=pytest.mark.slow), "w4a8"])
def test_dummy_weights_answer(checkpoints: dict[str, Path], scheme: str, release: None) -> None:
    """`--load-format dummy`: for timing, nothing is read but the headers."""
    llm = engine(checkpoints[scheme], load_format="dummy")
    answers = ask(llm)
    del llm
    assert [len(a.token_ids) for a in answers] == [TOKENS] * len(QUESTIONS)


def forced_logprobs(model: Any, source: Path, index: int, tokens: list[int]) -> torch.Tensor:
    """The log-probabilities that `model` gives to `tokens` as the answer to a question."""
    inputs = prompt(source, index)
    start = inputs["input_ids"].shape[1]
    answer = torch.tensor([tokens])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        logits = model(**inputs).logits[0, start - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, answer[0, :, None])[:, 0]
