"""Models, chat completions and embeddings by the `openai` package."""
import asyncio
import base64
import struct
from typing import Literal

import openai
import pytest
from conftest import KEY, MODEL, REPORT, URL, Report
from pydantic import BaseModel, create_model

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]
ABOUT_PARIS = [{"role": "user", "content": "What is the weather in Paris?"}]


class GetWeather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris"]
    unit: Literal["celsius"]


TOOLS = [openai.pydantic_function_tool(GetWeather)]
ARGUMENTS = GetWeather(city="Paris", unit="celsius")


@pytest.fixture(params=[False, True], ids=["lax", "strict"])
def client(request):
    """Strict, it checks each answer against its own types."""
    return openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=60,
                         _strict_response_validation=request.param)


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "mainstay"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_wrong_key():
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{URL}/v1", api_key="another", max_retries=0).models.list()


def test_whole_and_streamed_are_the_same(client):
    whole = client.chat.completions.create(model=MODEL, messages=ASKED)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    chunks = list(client.chat.completions.create(model=MODEL, messages=ASKED, stream=True,
                                                 stream_options={"include_usage": True}))
    *deltas, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == text
    assert deltas[-1].choices[0].finish_reason == "stop"
    assert not last.choices and last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1

    with client.chat.completions.stream(model=MODEL, messages=ASKED) as stream:
        seen = "".join(event.delta for event in stream if event.type == "content.delta")
        assert seen == text == stream.get_final_completion().choices[0].message.content


def test_cut_by_length(client):
    answer = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=3)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=ASKED, max_tokens=3, response_format=Report)


def test_logprobs(client):
    answer = client.chat.completions.create(model=MODEL, messages=ASKED, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in tokens)
    # the last token is the one that ends the answer
    assert b"".join(bytes(token.bytes) for token in tokens[:-1]).decode() == answer.choices[0].message.content


def test_a_tool_is_called_and_answered(client):
    answer = client.chat.completions.parse(model=MODEL, messages=ABOUT_PARIS, tools=TOOLS, tool_choice="required",
                                           parallel_tool_calls=False)
    assert answer.choices[0].finish_reason == "tool_calls"
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "GetWeather" and call.function.parsed_arguments == ARGUMENTS

    result = {"role": "tool", "tool_call_id": call.id, "content": "21"}
    said = answer.choices[0].message.model_dump(exclude_none=True, exclude={"parsed": True})
    answer = client.chat.completions.create(model=MODEL, messages=[*ABOUT_PARIS, said, result], tools=TOOLS,
                                            tool_choice="none")
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


def test_a_tool_is_called_in_a_stream(client):
    choice = {"type": "function", "function": {"name": "GetWeather"}}
    pieces = []
    with client.chat.completions.stream(model=MODEL, messages=ABOUT_PARIS, tools=TOOLS, tool_choice=choice,
                                        parallel_tool_calls=False) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                pieces.append(event.arguments_delta)
        final = stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls
    assert "".join(pieces) == call.function.arguments
    assert call.id and call.function.name == "GetWeather" and call.function.parsed_arguments == ARGUMENTS
    assert final.choices[0].finish_reason == "tool_calls"


def test_an_answer_of_a_type(client):
    answer = client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=Report)
    assert answer.choices[0].message.parsed == REPORT
    with client.chat.completions.stream(model=MODEL, messages=ASKED, response_format=Report) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == REPORT


def test_a_type_beside_tools(client):
    answer = client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=Report, tools=TOOLS,
                                           tool_choice="none")
    assert answer.choices[0].message.parsed == REPORT


def test_a_stored_completion(client):
    made = client.chat.completions.create(model=MODEL, messages=ASKED, store=True, metadata={"of": "sdks"})
    text = made.choices[0].message.content
    assert client.chat.completions.retrieve(made.id).choices[0].message.content == text
    assert made.id in [one.id for one in client.chat.completions.list(metadata={"of": "sdks"})]
    assert [message.content for message in client.chat.completions.messages.list(made.id)] == [text]
    assert client.chat.completions.update(made.id, metadata={"of": "none"}).metadata == {"of": "none"}
    assert client.chat.completions.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(made.id)


def test_embeddings(client):
    texts = ["a cat", "a dog"]
    both = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert [entry.index for entry in both.data] == [0, 1]
    first, second = (entry.embedding for entry in both.data)
    assert first != second and abs(sum(number * number for number in first) - 1) < 1e-3
    alone = client.embeddings.create(model=MODEL, input="a dog", encoding_format="float", dimensions=8)
    assert len(alone.data[0].embedding) == 8


def test_embeddings_in_base64():
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)

    def embedding(**form):
        return client.embeddings.create(model=MODEL, input="a cat", **form).data[0].embedding

    floats = embedding(encoding_format="float")
    assert base64.b64decode(embedding(encoding_format="base64")) == struct.pack(f"<{len(floats)}f", *floats)
    assert len(embedding()) == len(floats)


def test_each_of_many_gets_its_own_answer():
    """Streams with tools and with types, at the same time: each carries its own number."""

    async def called(client, number):
        tool = openai.pydantic_function_tool(create_model("Tell", number=(Literal[number], ...)))
        async with client.chat.completions.stream(model=MODEL, messages=ASKED, tools=[tool], tool_choice="required",
                                                  parallel_tool_calls=False) as stream:
            final = await stream.get_final_completion()
        return final.choices[0].message.tool_calls[0].function.parsed_arguments.number

    async def typed(client, number):
        kind = create_model("Told", number=(Literal[number], ...))
        async with client.chat.completions.stream(model=MODEL, messages=ASKED, response_format=kind) as stream:
            final = await stream.get_final_completion()
        return final.choices[0].message.parsed.number

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            return await asyncio.gather(*((called if number % 2 else typed)(client, number) for number in range(64)))

    assert asyncio.run(all_of_them()) == list(range(64))
