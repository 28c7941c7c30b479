"""Messages by the `anthropic` package."""
import anthropic
import pytest
from conftest import KEY, MODEL, REPORT, URL, Report

ASKED = {"model": MODEL, "max_tokens": 200, "system": "Be brief.",
         "messages": [{"role": "user", "content": "Say something."}]}
WEATHER = {"name": "get_weather", "description": "The weather of a city.",
           "input_schema": {"type": "object", "properties": {"city": {"const": "Paris"}}, "required": ["city"],
                            "additionalProperties": False}}
CALLED = {**ASKED, "tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}


@pytest.fixture(params=[False, True], ids=["lax", "strict"])
def client(request):
    """Strict, it checks each answer against its own types."""
    return anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0, timeout=60,
                               _strict_response_validation=request.param)


def read(usage):
    return usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens


def test_whole_and_streamed_are_the_same(client):
    whole = client.messages.create(**ASKED)
    [block] = whole.content
    assert block.type == "text" and block.text and whole.stop_reason == "end_turn" and whole.role == "assistant"
    with client.messages.stream(**ASKED) as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert final.content[0].text == block.text and final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert read(final.usage) == read(whole.usage)
    kinds = [event.type for event in client.messages.create(**ASKED, stream=True)]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]


def test_tokens_are_counted_as_they_are_used(client):
    asked = {name: value for name, value in ASKED.items() if name != "max_tokens"}
    counted = client.messages.count_tokens(**asked)
    assert counted.input_tokens == read(client.messages.create(**ASKED).usage)


def test_where_an_answer_ends(client):
    cut = client.messages.create(**{**ASKED, "max_tokens": 3})
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 3
    text = client.messages.create(**ASKED).content[0].text
    stopped = client.messages.create(**ASKED, stop_sequences=[text[4:7]])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == text[4:7]
    assert stopped.content[0].text == text[:text.index(text[4:7])]


def test_a_tool_is_called_and_answered(client):
    answer = client.messages.create(**CALLED)
    assert answer.stop_reason == "tool_use"
    [call] = [block for block in answer.content if block.type == "tool_use"]
    assert call.id and call.name == "get_weather" and call.input == {"city": "Paris"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "21"}]}
    turns = [*ASKED["messages"], {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    after = client.messages.create(**{**CALLED, "messages": turns, "tool_choice": {"type": "none"}})
    assert after.stop_reason == "end_turn" and after.content[0].text


def test_a_tool_is_called_in_a_stream(client):
    named = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    with client.messages.stream(**{**CALLED, "tool_choice": named}) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    [call] = [block for block in final.content if block.type == "tool_use"]
    assert len(pieces) > 1 and call.input == {"city": "Paris"} and final.stop_reason == "tool_use"


def test_an_answer_of_a_type(client):
    assert client.messages.parse(**ASKED, output_format=Report).parsed_output == REPORT


def test_errors(client):
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**ASKED, "model": "another"})
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**ASKED, extra_body={"temperature": 9})
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=URL, api_key="another", max_retries=0).messages.create(**ASKED)
