"""`evaluate_many` and the command: what is counted, compared, written and refused."""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from qig_serve import evaluate as evaluation
from qig_serve.cli import main
from qig_serve.demo import MODEL_DIR
from qig_serve.errors import UserError
from qig_serve.evaluation import generation
from qig_serve.evaluation.generation import generate_with
from qig_serve.evaluation.models import load_model
from qig_serve.evaluation.statistics import exact_match
from qig_serve.evaluation.table import results_table
from qig_serve.json_output import write_json
from qig_serve.model_directory import load_processor, model_dtype
from qig_serve.samples import Sample, data_url, sample_from_parts, sample_sha256


def evaluate(
    model: Path, reference: Path | None, asked: list[Sample]
) -> evaluation.EvaluationResult:
    """One model against full precision."""
    return evaluation.evaluate_many([(model.name, model)], reference, asked)[model.name]


def _questions(n: int = 8) -> list[Sample]:
    image = Image.new("RGB", (8, 8))
    kinds = ["odd" if i % 2 else "even" for i in range(n)]
    return [sample_from_parts(str(i), k, image, f"{i}?", str(i)) for i, k in enumerate(kinds)]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[str]]:
    """Models whose answers are written here: directory name -> answers."""
    script: dict[str, list[str]] = {}
    monkeypatch.setattr(evaluation, "generate", lambda directory, *_: script[Path(directory).name])
    for name in ("full", "low"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    return script


def test_counts_and_pairs(scripted: dict[str, list[str]], tmp_path: Path) -> None:
    scripted["full"] = ["0", "1", "2", "3", "4", "x", "x", "x"]
    scripted["low"] = ["0", " 1", "no no no no", "", "4", "5", "x", "y"]
    found = evaluation.evaluate_many(
        [("low", tmp_path / "low")], tmp_path / "full", _questions(), kl_samples=0
    )
    record = found["low"].to_json()
    assert list(found) == ["fp", "low"]
    assert (record["n"], record["exact_match"]) == (8, 0.5)
    assert record["by_type"] == {"even": 0.5, "odd": 0.5}
    assert record["n_by_type"] == {"even": 4, "odd": 4}
    assert (record["empty"], record["repeating"]) == (1, 1)
    pairs = record["paired"]
    assert (pairs["right_to_wrong"], pairs["wrong_to_right"]) == (2, 1)
    assert record["agreement"] == 4 / 8  # 0, 1, 4 and the wrong x
    assert record["kl_mean"] is None and record["top1"] is None
    full = found["fp"].to_json()
    assert (full["exact_match"], full["kl_mean"], full["top1"]) == (5 / 8, 0.0, 1.0)
    json.dumps(record, allow_nan=False)


def test_a_result_file_serves_as_reference(scripted: dict[str, list[str]], tmp_path: Path) -> None:
    scripted["full"] = [str(i) for i in range(8)]
    scripted["low"] = ["0", *["x"] * 7]
    first = evaluate(tmp_path / "full", None, _questions())
    path = tmp_path / "full.json"
    write_json(path, first.to_json(answers=True))
    second = evaluate(tmp_path / "low", path, _questions())
    assert second.paired is not None and second.paired.right_to_wrong == 7
    with pytest.raises(UserError, match="other questions"):
        evaluate(tmp_path / "low", path, _questions()[::-1])
    number = json.loads(path.read_text())
    number["answers"][0]["output"] = 5
    for record in ([], number):
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match="not a result"):
            evaluate(tmp_path / "low", path, _questions())


def test_names_are_printed_as_they_are(
    scripted: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich takes [red] for a colour, and :red_circle: for a picture of one."""
    name, kind = "low[red]", ":red_circle: [/x]"
    (tmp_path / "low").rename(tmp_path / name)
    scripted[name] = ["1"]
    data = tmp_path / "q.jsonl"
    line = {"messages": [{"role": "user", "content": "1?"}], "answer": "1", "type": kind}
    data.write_text(json.dumps(line))
    words = ["evaluate", str(tmp_path / name), "--data", str(data), "--engine", "transformers"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert f"  {kind} (1) " in shown.out and f" {name} " in shown.out
    assert f"{name}: answers (transformers): 1 question\n" in shown.err


def test_overlap_with_calibration_is_found(scripted: dict[str, list[str]], tmp_path: Path) -> None:
    scripted["low"] = ["0"] * 8
    questions = _questions()
    assert evaluate(tmp_path / "low", None, questions).calibration_overlap is None
    hashes = [sample_sha256(questions[3]), "0" * 64]
    report = {"calibration": {"sample_sha256": hashes}}
    (tmp_path / "low" / "report.json").write_text(json.dumps(report))
    assert evaluate(tmp_path / "low", None, questions).calibration_overlap == ("3",)


def test_what_is_refused(tmp_path: Path, twins: tuple[Path, Path]) -> None:
    questions = _questions()
    with pytest.raises(UserError, match="no config.json"):
        evaluate(tmp_path, None, questions)
    quantized = tmp_path / "q"
    quantized.mkdir()
    config = {"quantization_config": {"quant_method": "qig", "scheme": "w3a16"}}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantized"):
        evaluate(twins[0], quantized, questions)
    with pytest.raises(UserError, match="samples with answers"):
        evaluate(twins[0], None, [])
    other = tmp_path / "other"
    shutil.copytree(twins[0], other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["vocab_size"] += 1
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was not made of the reference .*: vocab_size is"):
        evaluate(twins[0], other, questions)
    long = sample_from_parts("long", "x", questions[0].images[0], "red " * 2000, "red")
    with pytest.raises(UserError, match=r"sample long is \d+ tokens long, and the model has"):
        evaluation.evaluate_many([("m", twins[1])], twins[0], [long], engine="none")
    with pytest.raises(UserError, match="unknown split"):
        evaluation.load_samples("demo:exam", 1)
    with pytest.raises(UserError, match="at least 1"):
        evaluation.load_samples("demo", 0)
    for draw in ({"n": 1 << 40}, {"seed": -1}):  # refused at once, and none of them drawn
        with pytest.raises(UserError, match=r"demonstration set has no \d+ questions of seed"):
            evaluation.load_samples("demo", **draw)
    with pytest.raises(UserError, match="is a directory: with --server, --reference names a file"):
        evaluation.read_outputs(tmp_path, questions, "")


def test_batched_answers_equal_single_ones() -> None:
    """Padding on the left must change nothing: short and long prompts in one batch."""
    full = MODEL_DIR
    questions = evaluation.load_samples("demo:dev", 8)
    model, processor = load_model(full, model_dtype(full)).float(), load_processor(full)
    together = generate_with(model, processor, questions, 8, lambda *_: None)
    apart = [generate_with(model, processor, [q], 8, lambda *_: None)[0] for q in questions]
    assert together == apart
    right = [exact_match(a, q.answer or "") for a, q in zip(together, questions, strict=True)]
    assert sum(right) >= 5  # the caption is cut short


def test_command_writes_json(
    twins: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, noisy = twins
    out = tmp_path / "r.json"
    status = main(
        ["evaluate", str(noisy), "--reference", str(full), "--data", "demo", "--n", "16"]
        + ["--engine", "transformers", "--max-tokens", "4", "--json", str(out)]
    )
    shown = capsys.readouterr()
    assert status == 0 and "exact match" in shown.out and "KL on answer tokens" in shown.err
    assert "full precision: answers (transformers): 16 questions" in shown.err
    header, counts = shown.out.splitlines()[1], [f"  {t} (2) " for t in ("color", "caption")]
    assert "full precision" in header and all(count in shown.out for count in counts)
    record = json.loads(out.read_text())
    assert record["n"] == 16 and record["kl_mean"] > 0 and record["kl"]["samples"] == 16
    assert set(record["by_type"]) == {"color", "shape", "count", "exist", "relation"} | {
        "digit",
        "word",
        "caption",
    }
    assert len(record["answers"]) == 16 and record["reference"]["kl_mean"] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "demo"], "give a model directory, or --server"),
        (["x", "--data", "none.jsonl"], "none.jsonl does not exist"),
        (["x", "--data", "demo", "--json", "no/such/r.json"], "does not exist"),
        (["no-model", "--data", "demo", "--n", "1"], "no-model does not exist"),
    ],
    ids=["no-model-no-server", "no-data", "no-reference", "absent-model"],
)
def test_command_says_what_is_wrong(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *words]) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err


class _Server(http.server.BaseHTTPRequestHandler):
    """Answers with the last word of the question; refuses questions with a 3 in them."""

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def _send(self, status: int, record: dict[str, Any]) -> None:
        body = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        picture, text = request["messages"][0]["content"]
        assert picture["image_url"]["url"].startswith("data:image/png;base64,")
        assert request["temperature"] == 0 and request["model"] == "m"
        if "3" in text["text"]:
            self._send(400, {"error": {"message": "no threes"}})
            return
        message: dict[str, Any] = {"role": "assistant", "content": text["text"].rstrip("?")}
        if "5" in text["text"]:
            message |= {"content": None, "reasoning": "Five, or"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._send(200, {"id": "1", "object": "chat.completion", "choices": [choice]})


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def test_failed_requests_are_counted_and_not_scored(server: str) -> None:
    result = evaluation.evaluate_server(server, None, _questions())
    record = result.to_json(answers=True)
    assert (record["n"], record["failed"], record["exact_match"]) == (6, 2, 1.0)
    assert record["n_by_type"] == {"even": 4, "odd": 2}
    assert "no threes" in record["failures"][0] and record["answers"][3]["output"] is None
    assert record["failures"][1] == "sample 5: thoughts and no answer: raise --max-tokens"


def test_ctrl_c_does_not_wait_for_a_server_that_hangs() -> None:
    over = threading.Event()

    class Silent(_Server):
        def do_POST(self) -> None:
            over.wait(20)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as httpd:
            threading.Thread(target=httpd.serve_forever, daemon=True).start()
            began = time.monotonic()
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                evaluation.evaluate_server(
                    f"http://127.0.0.1:{httpd.server_address[1]}", None, _questions()
                )
            assert time.monotonic() - began < 10
            over.set()
            httpd.shutdown()
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_share_of_nothing_is_printed() -> None:
    answers = (evaluation.Answer("1", "all", "red", None),)
    result = evaluation.EvaluationResult("s", "s", "server", answers, "", failures=("no",))
    with Console(record=True, file=io.StringIO()) as console:
        console.print(results_table({"s": result}))
    assert "failed requests" in (shown := console.export_text()) and "exact match" not in shown


def test_a_server_as_reference_for_another(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full precision on another machine: its answers are kept, and the next run is held to them."""
    data, full, low = (tmp_path / name for name in ("q.jsonl", "full.json", "low.json"))
    with data.open("w") as file:
        for sample in _questions():
            picture = {"type": "image_url", "image_url": {"url": data_url(sample.images[0])}}
            content = [picture, {"type": "text", "text": sample.question}]
            messages = [{"role": "user", "content": content}]
            line = {"id": sample.id, "type": sample.type, "messages": messages}
            file.write(json.dumps(line | {"answer": sample.answer}) + "\n")
    ask = ["evaluate", "--server", server, "--data", str(data)]
    assert main([*ask, "--json", str(full)]) == 1  # a request failed
    shown = capsys.readouterr()
    assert re.search(r"failed requests +│ +2 │", shown.out)
    assert re.search(r"questions +│ +6 │", shown.out)
    assert "failed request: sample 3: " in shown.err and "no threes" in shown.err
    assert "2 of 8 requests failed and are not scored" in shown.err
    assert main([*ask, "--reference", str(full), "--json", str(low), "--quiet"]) == 1
    record = json.loads(low.read_text())
    assert record["paired"]["n"] == 6 and record["agreement"] == 1  # 3 and 5 have no answer


def test_a_server_that_is_not_there_or_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_FIRST_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (9, silent.getsockname()[1]):
            with pytest.raises(UserError, match="is it running"):
                evaluation.evaluate_server(f"http://127.0.0.1:{port}", None, _questions(1))
