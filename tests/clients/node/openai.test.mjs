// Chat completions, responses and embeddings by the npm package `openai`.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI from 'openai';
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const url = process.env.MAINSTAY_URL;
const apiKey = process.env.MAINSTAY_KEY;
const model = 'mainstay-default';
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: 60_000 });

const messages = [{ role: 'user', content: 'Say something.' }];
// Constants alone, so that the answer is known and ends, whatever the model would say.
const report = { city: 'Zürich 🦀', degrees: 21 };
const Report = z.object({ city: z.literal(report.city), degrees: z.literal(report.degrees) });
const parameters = {
  type: 'object',
  properties: { city: { const: 'Paris' } },
  required: ['city'],
  additionalProperties: false,
};
const weather = { name: 'get_weather', description: 'The weather of a city.', parameters, strict: true };

async function running() {
  const page = await fetch(`${url}/metrics`, { headers: { authorization: `Bearer ${apiKey}` } });
  const counts = (await page.text()).match(/^vllm:num_requests_(running|waiting)\{.*$/gm);
  assert.equal(counts.length, 2);
  return counts.map((line) => Number(line.split(' ').at(-1))).reduce((sum, count) => sum + count);
}

async function waitFor(condition, milliseconds) {
  const end = Date.now() + milliseconds;
  while (!(await condition())) {
    assert.ok(Date.now() < end, `not so after ${milliseconds} ms`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

test('models', async () => {
  const ids = [];
  for await (const one of client.models.list()) ids.push(one.id);
  assert.deepEqual(ids, [model]);
  await assert.rejects(client.models.retrieve('another'), OpenAI.NotFoundError);
});

test('chat, whole and streamed', async () => {
  const whole = await client.chat.completions.create({ model, messages });
  const text = whole.choices[0].message.content;
  assert.ok(text);
  const stream = client.chat.completions.stream({ model, messages, stream_options: { include_usage: true } });
  let seen = '';
  stream.on('content', (delta) => (seen += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(seen, text);
  assert.equal(final.choices[0].message.content, text);
  assert.equal(final.choices[0].finish_reason, 'stop');
  assert.deepEqual(await stream.totalUsage().then((usage) => usage.completion_tokens), whole.usage.completion_tokens);
});

test('chat: a tool is run, then answered', async () => {
  const asked = [];
  const get = (given) => {
    asked.push(given);
    return '21 degrees';
  };
  const tool = { type: 'function', function: { ...weather, parse: JSON.parse, function: get } };
  const runner = client.chat.completions.runTools({
    model,
    messages,
    tools: [tool],
    tool_choice: { type: 'function', function: { name: weather.name } },
    parallel_tool_calls: false,
    stream: true,
  });
  await runner.done();
  assert.deepEqual(asked, [{ city: 'Paris' }]);
  assert.equal(runner.messages.at(-1).content, '21 degrees');
  const turns = runner.messages.map(({ parsed, ...message }) => message);
  const answer = await client.chat.completions.create({ model, messages: turns });
  assert.ok(answer.choices[0].message.content);
});

test('chat: an answer of a type', async () => {
  const response_format = zodResponseFormat(Report, 'report');
  const answer = await client.chat.completions.parse({ model, messages, response_format });
  assert.deepEqual(answer.choices[0].message.parsed, report);
});

test('responses, whole and streamed', async () => {
  const whole = await client.responses.create({ model, input: 'Say something.' });
  assert.ok(whole.output_text);
  const stream = client.responses.stream({ model, input: 'Say something.' });
  let seen = '';
  stream.on('response.output_text.delta', (event) => (seen += event.delta));
  const final = await stream.finalResponse();
  assert.equal(seen, whole.output_text);
  assert.equal(final.output_text, whole.output_text);
  const next = await client.responses.create({ model, input: 'And you?', previous_response_id: final.id });
  assert.ok(next.usage.input_tokens > final.usage.input_tokens);
  await client.responses.delete(final.id);
  await assert.rejects(client.responses.retrieve(final.id), OpenAI.NotFoundError);
});

test('responses: a tool is called, then answered', async () => {
  const tools = [{ type: 'function', ...weather }];
  const stream = client.responses.stream({ model, input: 'The weather?', tools, tool_choice: 'required' });
  const final = await stream.finalResponse();
  const [call] = final.output;
  assert.equal(call.type, 'function_call');
  assert.deepEqual(JSON.parse(call.arguments), { city: 'Paris' });
  const answer = await client.responses.create({
    model,
    previous_response_id: final.id,
    input: final.output.map((one) => ({ type: 'function_call_output', call_id: one.call_id, output: '21' })),
  });
  assert.ok(answer.output_text);
});

test('responses: an answer of a type', async () => {
  const format = zodTextFormat(Report, 'report');
  const answer = await client.responses.parse({ model, input: 'The weather?', text: { format } });
  assert.deepEqual(answer.output_parsed, report);
});

test('responses: in the background', async () => {
  let response = await client.responses.create({ model, input: 'Say something.', background: true });
  await waitFor(async () => {
    response = await client.responses.retrieve(response.id);
    return response.status === 'completed';
  }, 30_000);
  assert.ok(response.output_text);
});

test('a conversation', async () => {
  const conversation = await client.conversations.create({ metadata: { of: 'node' } });
  const answer = await client.responses.create({ model, input: 'I am Ada.', conversation: conversation.id });
  const items = [];
  for await (const item of client.conversations.items.list(conversation.id, { order: 'asc' })) items.push(item);
  assert.deepEqual(items.map((item) => item.content[0].text), ['I am Ada.', answer.output_text]);
  assert.ok((await client.conversations.delete(conversation.id)).deleted);
});

test('embeddings', async () => {
  // The client asks for base64 of its own accord.
  const packed = await client.embeddings.create({ model, input: ['a cat', 'a dog'] });
  const floats = await client.embeddings.create({ model, input: ['a cat', 'a dog'], encoding_format: 'float' });
  assert.equal(packed.data.length, 2);
  assert.deepEqual(packed.data.map((one) => one.embedding.map(Math.fround)),
    floats.data.map((one) => one.embedding.map(Math.fround)));
});

test('a client that leaves', async () => {
  const endless = { model, messages, max_tokens: 8000, ignore_eos: true };
  const stream = await client.chat.completions.create({ ...endless, stream: true });
  for await (const _ of stream) break;
  await waitFor(async () => (await running()) === 0, 1000);

  const abort = new AbortController();
  const whole = client.chat.completions.create(endless, { signal: abort.signal });
  await waitFor(async () => (await running()) === 1, 1000);
  abort.abort();
  await assert.rejects(whole, OpenAI.APIUserAbortError);
  await waitFor(async () => (await running()) === 0, 1000);
});
