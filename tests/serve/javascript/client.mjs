// What OpenAI's own client for JavaScript sees of an endpoint: `node client.mjs BASE_URL MODEL`, as JSON on stdout.
import { createReadStream, writeFileSync } from "node:fs";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "hello" }];
const tools = [{ type: "function", function: { name: "f" } }];
const schema = { type: "object", properties: { a: { type: "boolean" } }, required: ["a"], additionalProperties: false };
const seen = {};

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

async function refusal(ask) {
  try {
    await ask();
    return null;
  } catch (error) {
    return {
      class: error.constructor.name,
      status: error.status,
      type: error.type,
      code: error.code,
      param: error.param,
    };
  }
}

seen.models = (await collect(client.models.list())).map((each) => each.id);
seen.model = (await client.models.retrieve(model)).id;

const greedy = { model, prompt: "the quick ", max_tokens: 12, temperature: 0 };
seen.completion = await client.completions.create({ ...greedy, logprobs: 2, n: 2 });
seen.echo = await client.completions.create({ ...greedy, prompt: [5, 6, 7], echo: true, logprobs: 0, max_tokens: 1 });
seen.streamed = await collect(
  await client.completions.create({ ...greedy, stream: true, stream_options: { include_usage: true } }),
);

const chat = { model, messages, max_tokens: 12, temperature: 0 };
seen.chat = await client.chat.completions.create({ ...chat, logprobs: true, top_logprobs: 1 });
seen.chatStreamed = await collect(await client.chat.completions.create({ ...chat, stream: true }));
seen.chatFinal = await client.chat.completions.stream(chat).finalContent();
seen.tools = await client.chat.completions.create({ ...chat, tools });
seen.schema = await client.chat.completions.create({
  ...chat,
  max_tokens: 40,
  response_format: { type: "json_schema", json_schema: { name: "flag", schema, strict: true } },
});

seen.embeddings = await client.embeddings.create({ model, input: ["the hand", "the bush"] });
seen.floats = await client.embeddings.create({ model, input: "the hand", encoding_format: "float" });

writeFileSync("requests.jsonl", JSON.stringify({ custom_id: "1", method: "POST", url: "/v1/completions", body: greedy }) + "\n");
const file = await client.files.create({ file: createReadStream("requests.jsonl"), purpose: "batch" });
seen.file = await client.files.retrieve(file.id);
seen.fileText = await (await client.files.content(file.id)).text();
seen.files = (await collect(client.files.list())).map((each) => each.id === file.id);
let batch = await client.batches.create({
  input_file_id: file.id,
  endpoint: "/v1/completions",
  completion_window: "24h",
});
while (!["completed", "failed", "cancelled", "expired"].includes(batch.status)) {
  await new Promise((after) => setTimeout(after, 100));
  batch = await client.batches.retrieve(batch.id);
}
seen.batch = batch;
seen.batchLine = JSON.parse(await (await client.files.content(batch.output_file_id)).text());

seen.refused = {
  field: await refusal(() => client.completions.create({ ...greedy, n: 0 })),
  unsupported: await refusal(() => client.chat.completions.create({ ...chat, audio: { voice: "x" } })),
  unknown: await refusal(() => client.completions.create({ ...greedy, model: "gpt-5" })),
  long: await refusal(() => client.completions.create({ ...greedy, prompt: "word ".repeat(1_000) })),
  late: await refusal(() => client.completions.create({ ...greedy, timeout: 1e-9 })),
  image: await refusal(() => client.images.generate({ prompt: "a bird" })),
};

// Who leaves a stream has its work ended.
const left = await client.completions.create({ ...greedy, max_tokens: 100, stream: true });
for await (const chunk of left) {
  left.controller.abort();
  break;
}
seen.after = (await client.completions.create(greedy)).choices[0].text;

process.stdout.write(JSON.stringify(seen));
