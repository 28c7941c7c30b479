"""Completions, responses, embeddings and messages by the `litellm` package."""
import asyncio
import json

import litellm
import pytest
from conftest import KEY, MODEL, REPORT, URL, Report

litellm.telemetry = False
SERVER = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY, "timeout": 60, "num_retries": 0}
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"const": "Paris"}}, "required": ["city"],
              "additionalProperties": False}
WEATHER = {"name": "get_weather", "description": "The weather of a city.", "parameters": PARAMETERS}
CALLED = {"messages": ASKED, "tools": [{"type": "function", "function": WEATHER}], "tool_choice": "required",
          "parallel_tool_calls": False}


def test_whole_and_streamed_are_the_same():
    whole = litellm.completion(**SERVER, messages=ASKED)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens > 0
    chunks = list(litellm.completion(**SERVER, messages=ASKED, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    built = litellm.stream_chunk_builder(chunks)
    assert built.choices[0].message.content == text
    assert built.usage.completion_tokens == whole.usage.completion_tokens


def test_a_tool_is_called_and_answered():
    answer = litellm.completion(**SERVER, **CALLED)
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Paris"}
    assert answer.choices[0].finish_reason == "tool_calls"
    built = litellm.stream_chunk_builder(list(litellm.completion(**SERVER, **CALLED, stream=True)))
    [streamed] = built.choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    turns = [*ASKED, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "21"}]
    after = litellm.completion(**SERVER, **{**CALLED, "messages": turns, "tool_choice": "none"})
    assert after.choices[0].message.content and not after.choices[0].message.tool_calls


def test_an_answer_of_a_type():
    answer = litellm.completion(**SERVER, messages=ASKED, response_format=Report)
    assert Report.model_validate_json(answer.choices[0].message.content) == REPORT


def test_responses():
    whole = litellm.responses(**SERVER, input="Say something.")
    text = whole.output[0].content[0].text
    assert whole.status == "completed" and text
    events = list(litellm.responses(**SERVER, input="Say something.", stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == text and events[-1].type == "response.completed"
    chained = litellm.responses(**SERVER, input="And you?", previous_response_id=whole.id)
    assert chained.usage.input_tokens > whole.usage.input_tokens


def test_responses_with_a_tool():
    tool = {"type": "function", **WEATHER}
    answer = litellm.responses(**SERVER, input="The weather?", tools=[tool], tool_choice="required",
                               parallel_tool_calls=False)
    [call] = [item for item in answer.output if item.type == "function_call"]
    assert call.name == "get_weather" and json.loads(call.arguments) == {"city": "Paris"}


def test_embeddings():
    both = litellm.embedding(**SERVER, input=["a cat", "a dog"], encoding_format="float")
    first, second = (entry["embedding"] for entry in both.data)
    assert len(first) == len(second) and first != second


def test_messages():
    server = {**SERVER, "model": f"anthropic/{MODEL}", "api_base": URL}
    answer = asyncio.run(litellm.anthropic_messages(**server, messages=ASKED, max_tokens=100))
    assert answer["content"][0]["text"] and answer["stop_reason"] == "end_turn"
    same = litellm.completion(**server, messages=ASKED, max_tokens=100)
    assert same.choices[0].message.content == answer["content"][0]["text"]


def test_errors():
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**SERVER, messages=ASKED, temperature=9)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**SERVER, "model": "openai/another"}, messages=ASKED)
