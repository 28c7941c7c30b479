"""A client that leaves stops what it has asked for, streamed or not."""
import threading

import anthropic
import httpx
import openai
import pytest
from conftest import KEY, MODEL, URL, running, wait_for

# Without an end of its own, an answer of this length takes seconds.
LONG = 8000
MESSAGES = [{"role": "user", "content": "Say something."}]
ENDLESS = {"ignore_eos": True}


@pytest.fixture
def client():
    return openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=60)


def leave(stream):
    """Reads some of a stream and goes."""
    for _ in range(8):
        next(stream)
    assert running() == 1
    stream.close()
    wait_for(lambda: running() == 0, 1)


def test_a_stream_of_chat(client):
    leave(client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=LONG, stream=True,
                                         extra_body=ENDLESS))


def test_a_stream_of_a_response(client):
    leave(client.responses.create(model=MODEL, input="Say something.", max_output_tokens=LONG, stream=True,
                                  extra_body=ENDLESS))


def test_a_stream_of_messages():
    client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
    leave(client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=LONG, stream=True, extra_body=ENDLESS))


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": LONG}),
    ("/v1/responses", {"input": "Say something.", "max_output_tokens": LONG}),
    ("/v1/completions", {"prompt": "Say something.", "max_tokens": LONG}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": LONG}),
])
def test_a_whole_answer(path, body):
    """The connection is closed while nothing has come yet."""
    asked = {"model": MODEL, **body, **ENDLESS}
    with httpx.Client(base_url=URL, headers={"authorization": f"Bearer {KEY}"}, trust_env=False) as client:
        def ask():
            with pytest.raises(httpx.TimeoutException):
                client.post(path, json=asked, timeout=httpx.Timeout(60, read=0.5))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: running() == 1, 1)
        thread.join()
    wait_for(lambda: running() == 0, 1)


def test_one_that_stays_is_not_stopped(client):
    """A response of the background is not its client's."""
    stream = client.responses.create(model=MODEL, input="Say something.", stream=True, background=True,
                                     max_output_tokens=500, extra_body=ENDLESS)
    name = next(stream).response.id
    stream.close()
    wait_for(lambda: client.responses.retrieve(name).status == "incomplete", 30)
    assert client.responses.retrieve(name).usage.output_tokens == 500
