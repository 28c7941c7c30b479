"""The servers under test, and what several of the clients are asked for."""
import os
import time
from typing import Literal

import httpx
import pytest
from pydantic import BaseModel

URL = os.environ["MAINSTAY_URL"]
SCRIPTED_URL = os.environ["MAINSTAY_SCRIPTED_URL"]
KEY = os.environ["MAINSTAY_KEY"]
MODEL = "mainstay-default"


class Report(BaseModel):
    """Constants alone, so that the answer is known and ends, whatever the model would say."""

    city: Literal["Zürich 🦀"]
    degrees: Literal[21]


REPORT = Report(city="Zürich 🦀", degrees=21)


def running():
    """How many requests the server computes or holds back."""
    text = httpx.get(f"{URL}/metrics", headers={"authorization": f"Bearer {KEY}"}, trust_env=False).text
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    counts = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(names)]
    assert len(counts) == 2, text
    return sum(counts)


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """Each test leaves the server idle."""
    yield
    wait_for(lambda: running() == 0, 1)
