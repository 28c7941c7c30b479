"""Chat models and embeddings by the `langchain-openai` package, over chat completions and over Responses."""
from typing import Literal

import pytest
from conftest import KEY, MODEL, REPORT, URL, Report
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

ASKED = [SystemMessage("Be brief."), HumanMessage("What is the weather in Paris?")]


@tool
def get_weather(city: Literal["Paris"]) -> str:
    """The weather of a city."""
    return f"21 degrees in {city}"


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def model(request):
    return ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=60,
                      stream_usage=True, use_responses_api=request.param)


def test_whole_and_streamed_are_the_same(model):
    whole = model.invoke(ASKED)
    assert whole.text and whole.usage_metadata["output_tokens"] > 0
    chunks = list(model.stream(ASKED))
    assert "".join(chunk.text for chunk in chunks) == whole.text and len(chunks) > 2
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [one["output_tokens"] for one in usage] == [whole.usage_metadata["output_tokens"]]


def test_a_batch(model):
    alone = [model.invoke(text).text for text in ("Hello", "Say something.")]
    assert [answer.text for answer in model.batch(["Hello", "Say something."])] == alone


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_tool_is_called_and_answered(model, streamed):
    forced = model.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    if streamed:
        pieces = list(forced.stream(ASKED))
        said = pieces[0]
        for piece in pieces[1:]:
            said += piece
    else:
        said = forced.invoke(ASKED)
    [call] = said.tool_calls
    assert call["name"] == "get_weather" and call["args"] == {"city": "Paris"} and call["id"]
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage) and result.content == "21 degrees in Paris"
    answer = model.bind_tools([get_weather], tool_choice="none").invoke([*ASKED, said, result])
    assert answer.text and not answer.tool_calls


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_of_a_type(model, method):
    assert model.with_structured_output(Report, method=method).invoke(ASKED) == REPORT


def test_a_chain_on_the_server():
    model = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, max_retries=0, use_responses_api=True,
                       use_previous_response_id=True)
    first = model.invoke("I am Ada. " * 30)
    second = model.invoke([HumanMessage("I am Ada. " * 30), first, HumanMessage("And you?")])
    assert second.text and second.usage_metadata["input_token_details"]["cache_read"] > 0
    assert second.usage_metadata["input_tokens"] > first.usage_metadata["input_tokens"]


def test_embeddings():
    embeddings = OpenAIEmbeddings(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, max_retries=0,
                                  check_embedding_ctx_length=False)
    first, second = embeddings.embed_documents(["a cat", "a dog"])
    assert first != second and second == embeddings.embed_query("a dog")
