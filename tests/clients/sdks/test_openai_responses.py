"""Responses and conversations by the `openai` package."""
import time
from typing import Literal

import openai
import pytest
from conftest import KEY, MODEL, REPORT, URL, Report
from pydantic import BaseModel

WEATHER = {"type": "function", "name": "get_weather", "description": "The weather of a city.", "strict": True,
           "parameters": {"type": "object", "properties": {"city": {"const": "Paris"}}, "required": ["city"],
                          "additionalProperties": False}}
CALLED = {"model": MODEL, "input": "What is the weather in Paris?", "tools": [WEATHER], "tool_choice": "required",
          "parallel_tool_calls": False}
ARGUMENTS = '{"city": "Paris"}'


class GetWeather(BaseModel):
    city: Literal["Paris"]


@pytest.fixture(params=[False, True], ids=["lax", "strict"])
def client(request):
    """Strict, it checks each answer against its own types."""
    return openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=60,
                         _strict_response_validation=request.param)


def ended(client, response):
    """The response of the background, once it is over."""
    end = time.monotonic() + 30
    while response.status in ("queued", "in_progress"):
        assert time.monotonic() < end, response.status
        time.sleep(0.02)
        response = client.responses.retrieve(response.id)
    return response


def test_whole_and_streamed_are_the_same(client):
    whole = client.responses.create(model=MODEL, input="Say something.", instructions="Be brief.")
    assert whole.status == "completed" and whole.output_text
    assert client.responses.retrieve(whole.id).output_text == whole.output_text

    with client.responses.stream(model=MODEL, input="Say something.", instructions="Be brief.") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_stream_is_read_again(client):
    stream = client.responses.create(model=MODEL, input="Say something.", stream=True, background=True)
    events = list(stream)
    again = list(client.responses.retrieve(events[0].response.id, stream=True, starting_after=2))
    assert [event.sequence_number for event in again] == list(range(3, len(events)))
    assert again[-1].response.output_text == events[-1].response.output_text


def test_cut_by_length(client):
    response = client.responses.create(model=MODEL, input="Say something.", max_output_tokens=3)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 3


def test_a_chain(client):
    first = client.responses.create(model=MODEL, input="I am Ada. " * 30)
    second = client.responses.create(model=MODEL, input="And you?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens
    # what the first has computed is not computed again
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 16
    fork = client.responses.create(model=MODEL, input="And you?", previous_response_id=first.id)
    assert fork.output_text == second.output_text

    items = list(client.responses.input_items.list(second.id, order="asc"))
    assert [item.content[0].text for item in items] == ["And you?"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    assert client.responses.retrieve(second.id).output_text == second.output_text


def test_in_the_background(client):
    made = client.responses.create(model=MODEL, input="Say something.", background=True)
    assert made.status in ("queued", "in_progress", "completed") and made.background
    over = ended(client, made)
    assert over.status == "completed" and over.output_text


def test_the_background_is_cancelled(client):
    made = client.responses.create(model=MODEL, input="Say something.", background=True, max_output_tokens=6000,
                                   extra_body={"ignore_eos": True})
    assert client.responses.cancel(made.id).status == "cancelled"
    assert client.responses.cancel(made.id).status == "cancelled"
    assert ended(client, made).status == "cancelled"


def test_a_conversation(client):
    conversation = client.conversations.create(metadata={"of": "sdks"})
    first = client.responses.create(model=MODEL, input="I am Ada.", conversation=conversation.id)
    second = client.responses.create(model=MODEL, input="And you?", conversation=conversation.id)
    assert second.conversation.id == conversation.id
    assert second.usage.input_tokens > first.usage.input_tokens
    items = list(client.conversations.items.list(conversation.id, order="asc"))
    assert [item.role for item in items] == ["user", "assistant"] * 2
    assert [items[1].content[0].text, items[3].content[0].text] == [first.output_text, second.output_text]
    assert client.conversations.items.delete(items[0].id, conversation_id=conversation.id).id == conversation.id
    assert len(list(client.conversations.items.list(conversation.id))) == 3
    assert client.conversations.delete(conversation.id).deleted


def test_tokens_are_counted_as_they_are_used(client):
    asked = {"model": MODEL, "input": "Say something.", "instructions": "Be brief.", "tools": [WEATHER]}
    counted = client.responses.input_tokens.count(**asked).input_tokens
    assert client.responses.create(**asked, tool_choice="none").usage.input_tokens <= counted
    assert client.responses.create(**asked, tool_choice="auto").usage.input_tokens == counted


def test_a_tool_is_called_and_answered(client):
    response = client.responses.create(**CALLED)
    [call] = [item for item in response.output if item.type == "function_call"]
    assert call.name == "get_weather" and GetWeather.model_validate_json(call.arguments).city == "Paris"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    chained = client.responses.create(model=MODEL, input=[result], previous_response_id=response.id, tools=[WEATHER],
                                      tool_choice="none")
    assert chained.status == "completed" and chained.output_text
    # the same without the server's memory: the client sends back what it got
    sent = [{"role": "user", "content": CALLED["input"]}, *response.output, result]
    alone = client.responses.create(model=MODEL, input=sent, tools=[WEATHER], tool_choice="none", store=False)
    assert alone.output_text == chained.output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(alone.id)


def test_a_tool_is_called_in_a_stream(client):
    with client.responses.stream(**CALLED) as stream:
        events = list(stream)
        final = stream.get_final_response()
    [call] = [item for item in final.output if item.type == "function_call"]
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(pieces) == done.arguments == call.arguments
    assert GetWeather.model_validate_json(call.arguments).city == "Paris"
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {call.id}


def test_an_answer_of_a_type(client):
    parsed = client.responses.parse(model=MODEL, input="Say something.", text_format=Report)
    assert parsed.output_parsed == REPORT
    with client.responses.stream(model=MODEL, input="Say something.", text_format=Report) as stream:
        assert stream.get_final_response().output_parsed == REPORT


def test_a_websocket(client):
    with client.responses.connect() as connection:
        first = asked(connection, input="I am Ada.", store=False)
        second = asked(connection, input="And you?", store=False, previous_response_id=first.id)
    assert first.output_text and second.output_text
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens
    assert first.output_text == client.responses.create(model=MODEL, input="I am Ada.").output_text


def asked(connection, **fields):
    """The response that a connection is asked for; its text has come in pieces before."""
    connection.response.create(model=MODEL, **fields)
    text = ""
    for event in connection:
        assert event.type not in ("error", "response.failed", "response.incomplete"), event
        if event.type == "response.output_text.delta":
            text += event.delta
        if event.type == "response.completed":
            assert event.response.output_text == text
            return event.response
    raise AssertionError("the connection ended")


def test_compaction():
    # the client's types allow no message of a user in what is compacted, but the API's description has one
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
    compacted = client.responses.compact(model=MODEL, input=[{"role": "user", "content": "I am Ada."}])
    assert compacted.object == "response.compaction"
    kept = [item.to_dict() for item in compacted.output]
    response = client.responses.create(model=MODEL, input=[*kept, {"role": "user", "content": "And you?"}])
    assert response.status == "completed" and response.output_text


def test_errors(client):
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="another", input="a")
    for wrong in ({"temperature": 9}, {"input": [{"type": "no_such_item"}]}, {"previous_response_id": "resp_none"}):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
            client.responses.create(**{"model": MODEL, "input": "a", **wrong})
        assert next(iter(wrong)) in error.value.param, error.value
