"""Agents by the `openai-agents` package, over Responses and over chat completions."""
import asyncio
from typing import Literal

import agents
import openai
import pytest
from conftest import KEY, MODEL, REPORT, SCRIPTED_URL, URL, Report

agents.set_tracing_disabled(True)
MODELS = {"responses": agents.OpenAIResponsesModel, "websocket": agents.OpenAIResponsesWSModel,
          "chat": agents.OpenAIChatCompletionsModel}


def client_of(url):
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param](model=MODEL, openai_client=client_of(URL))


@pytest.fixture(params=MODELS)
def scripted(request):
    """A model that calls `get_weather` of its own accord, and ends when it has the result."""
    return MODELS[request.param](model="scripted", openai_client=client_of(SCRIPTED_URL))


class Desk:
    """A function tool that keeps what it was called with, and is there until it was called."""

    def __init__(self):
        self.asked = []

        @agents.function_tool(is_enabled=lambda *_: not self.asked)
        def get_weather(city: Literal["Paris"], unit: Literal["celsius"]) -> str:
            """The weather of a city."""
            self.asked.append((city, unit))
            return "21 degrees"

        self.tool = get_weather


def agent(model, **more):
    """An agent that must call its tool before it answers."""
    settings = agents.ModelSettings(tool_choice="required" if "tools" in more else None, parallel_tool_calls=False)
    return agents.Agent(name="Reporter", instructions="Be brief.", model=model, model_settings=settings, **more)


def kinds(result):
    return [item.type for item in result.new_items]


def test_an_agent_calls_its_tool(model):
    desk = Desk()
    result = agents.Runner.run_sync(agent(model, tools=[desk.tool]), "What is the weather in Paris?")
    assert desk.asked == [("Paris", "celsius")]
    assert kinds(result) == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert result.new_items[1].output == "21 degrees"
    assert result.final_output and isinstance(result.final_output, str)
    assert result.context_wrapper.usage.requests == 2 and result.context_wrapper.usage.input_tokens > 0


def test_an_agent_calls_its_tool_in_a_stream(model):
    desk = Desk()

    async def run():
        result = agents.Runner.run_streamed(agent(model, tools=[desk.tool]), "What is the weather in Paris?")
        deltas = [event.data.delta async for event in result.stream_events()
                  if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"]
        return result, "".join(deltas)

    result, text = asyncio.run(run())
    assert desk.asked == [("Paris", "celsius")]
    assert kinds(result) == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert result.final_output == text != ""


def test_an_agent_decides_by_itself(scripted):
    asked = []

    @agents.function_tool
    def get_weather(location: str) -> str:
        """The weather of a place."""
        asked.append(location)
        return "sunny"

    clerk = agents.Agent(name="Clerk", model=scripted, tools=[get_weather])
    result = agents.Runner.run_sync(clerk, "What is the weather in San Francisco?")
    assert asked == ["San Francisco, CA"]
    assert kinds(result) == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert result.final_output == "It is sunny in San Francisco."


def test_an_agent_answers_with_a_type(model):
    assert agents.Runner.run_sync(agent(model, output_type=Report), "The weather?").final_output == REPORT


def test_an_agent_answers_with_a_type_after_its_tool(model):
    desk = Desk()
    result = agents.Runner.run_sync(agent(model, output_type=Report, tools=[desk.tool]), "The weather?")
    assert desk.asked == [("Paris", "celsius")] and result.final_output == REPORT


def test_one_agent_hands_over_to_another(model):
    second = agent(model, output_type=Report)
    settings = agents.ModelSettings(tool_choice="required", parallel_tool_calls=False)
    first = agents.Agent(name="Desk", model=model, model_settings=settings, handoffs=[second])
    result = agents.Runner.run_sync(first, "The weather?")
    assert result.last_agent is second and result.final_output == REPORT
    assert kinds(result) == ["handoff_call_item", "handoff_output_item", "message_output_item"]


def test_what_was_said_stays_on_the_server():
    client = client_of(URL)
    speaker = agent(agents.OpenAIResponsesModel(model=MODEL, openai_client=client))

    async def run():
        chained = await agents.Runner.run(speaker, "I am Ada.")
        again = await agents.Runner.run(speaker, "And you?", previous_response_id=chained.last_response_id)
        session = agents.OpenAIConversationsSession(openai_client=client)
        await agents.Runner.run(speaker, "I am Ada.", session=session)
        kept = await agents.Runner.run(speaker, "And you?", session=session)
        items = await session.get_items()
        await session.clear_session()
        return again, kept, items

    again, kept, items = asyncio.run(run())
    assert again.final_output == kept.final_output != ""
    assert [item["role"] for item in items] == ["user", "assistant"] * 2
