"""schemathesis against the OpenAPI document that the server serves: no request is its fault."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("schemathesis")

import httpx
import schemathesis
from helpers.server_process import Server
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from requests_to import CHAT, COMPLETIONS, ROUTES, Tally, assert_still_right, plain_body
from schemathesis import GenerationMode

pytestmark = pytest.mark.slow

SHARE = float(os.environ.get("QIG_TEST_SCHEMA_SHARE", "1"))
CASES = {CHAT: int(300 * SHARE), COMPLETIONS: int(720 * SHARE)}
"""For positive and for negative data: 2,040 in all. Those of chat take long to draw."""


def steer(route: str, body: Any, keep: float, random: Any) -> Any:
    """The case with only some of its fields, laid over a request that is answered.

    A case with sixty random fields is refused for one of them: the others are never looked at.
    """
    if not isinstance(body, dict):
        return body
    plain = plain_body(route)
    kept = {k: v for k, v in body.items() if random.random() < keep and k != "model"}
    tokens = kept.get("max_tokens")
    if tokens is None or (isinstance(tokens, int) and tokens > 8):
        kept["max_tokens"] = 8  # or a valid case takes seconds
    return plain | kept


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("route", ROUTES)
def test_no_case_is_the_servers_fault(server: Server, route: str, mode: GenerationMode) -> None:
    document = httpx.get(f"{server.url}/openapi.json", timeout=30).json()
    schema = schemathesis.openapi.from_dict(document)
    operation = schema[route]["POST"]
    tally = Tally()

    @settings(
        max_examples=CASES[route],
        phases=[Phase.generate],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(
        case=operation.as_strategy(generation_mode=mode),
        keep=st.sampled_from([0.05, 0.1, 0.3, 1.0]),
        steered=st.booleans(),
        random=st.randoms(use_true_random=False),
    )
    def run(case: Any, keep: float, steered: bool, random: Any) -> None:
        if steered:
            case.body = steer(route, case.body, keep, random)
        answer = case.call(base_url=server.url, timeout=120)
        tally.note(case.body, answer.status_code, answer.text)

    run()
    print(f"\n{route} {mode.value}: {tally}")
    assert not tally.faults, f"{tally}\n" + "\n".join(tally.faults[:20])
    assert tally.statuses.total() >= CASES[route]
    assert tally.statuses[200] > 0 or mode is GenerationMode.NEGATIVE
    assert_still_right(server.url)
