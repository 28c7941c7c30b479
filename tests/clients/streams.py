"""256 streams at once, each held to a form of its own: no error, and no answer has another's marker.

usage: streams.py URL KEY MODEL
"""

import asyncio
import json
import sys

import httpx

STREAMS = 256
# Bursts above the queue are answered 429 with Retry-After; a client waits and asks again.
RETRIES = 200


def request(at, model):
    """One of: a schema, a call that is required, a response with a schema."""
    marker = f"marker-{at}"
    schema = {
        "type": "object",
        "properties": {"marker": {"const": marker}, "n": {"enum": [1, 2, 3]}},
        "required": ["marker", "n"],
        "additionalProperties": False,
    }
    messages = [{"role": "user", "content": f"Say {marker}."}]
    common = {"model": model, "stream": True, "temperature": 1, "seed": at}
    if at % 3 == 0:
        form = {"type": "json_schema", "json_schema": {"name": "m", "schema": schema, "strict": True}}
        return "/chat/completions", {**common, "messages": messages, "response_format": form, "max_tokens": 200}
    if at % 3 == 1:
        tool = {"type": "function", "function": {"name": f"f{at}", "parameters": schema, "strict": True}}
        tools = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
        return "/chat/completions", {**common, "messages": messages, **tools, "max_tokens": 200}
    form = {"format": {"type": "json_schema", "name": "m", "schema": schema, "strict": True}}
    return "/responses", {**common, "input": messages, "text": form, "max_output_tokens": 200}


def text_of(at, events):
    if at % 3 == 0:
        return "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e.get("choices"))
    if at % 3 == 1:
        calls = [c for e in events if e.get("choices") for c in e["choices"][0]["delta"].get("tool_calls", [])]
        names = [c["function"]["name"] for c in calls if c["function"].get("name")]
        assert names == [f"f{at}"], f"stream {at}: calls {names}"
        return "".join(c["function"].get("arguments") or "" for c in calls)
    assert events[-1]["type"] == "response.completed", f"stream {at}: {events[-1]}"
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


async def stream(client, at, model):
    path, body = request(at, model)
    for _ in range(RETRIES):
        async with client.stream("POST", path, json=body) as reply:
            if reply.status_code == 429:
                await reply.aread()
                await asyncio.sleep(float(reply.headers["retry-after"]))
                continue
            assert reply.status_code == 200, f"stream {at}: {reply.status_code} {await reply.aread()}"
            events = []
            async for line in reply.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    events.append(json.loads(line[6:]))
            assert not any("error" in e and e["error"] for e in events), f"stream {at}: {events[-1]}"
            answer = json.loads(text_of(at, events))
            assert answer["marker"] == f"marker-{at}", f"stream {at} has {answer}"
            return
    raise AssertionError(f"stream {at} was always refused")


async def main(url, key, model):
    limits = httpx.Limits(max_connections=STREAMS)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits) as client:
        await asyncio.gather(*(stream(client, at, model) for at in range(STREAMS)))
    print(f"{STREAMS} streams, each with its own marker")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
