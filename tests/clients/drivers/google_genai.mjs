// @google/genai: releases that send training data, and newer ones that leave it out of the request.
import { assert, clientRefuses, load, raises, stage, works } from './calls.mjs';

const { ApiError, GoogleGenAI } = await load('@google/genai');
const BASE = 'models/gemini-1.5-flash-001-tuning';
const [major, minor] = stage.version.split('.').map(Number);
const DROPS_TRAINING_DATA = major > 1 || minor >= 28;
const GREEDY = { temperature: 0, maxOutputTokens: 8 };
const trainingDataset = {
  examples: stage.examples.map(({ text_input, output }) => ({ textInput: text_input, output })),
};

function signIn(apiKey, headers) {
  return new GoogleGenAI({ apiKey, httpOptions: { baseUrl: stage.url, headers } });
}

function config(tunedModelDisplayName, epochCount = 2, data = true) {
  const extraBody = { tuningTask: { trainingData: { examples: { examples: stage.examples } } } };
  return {
    tunedModelDisplayName,
    epochCount,
    batchSize: 4,
    learningRate: 0.001,
    ...(DROPS_TRAINING_DATA && data ? { httpOptions: { extraBody } } : {}),
  };
}

function tune(ai, baseModel, ...options) {
  return ai.tunings.tune({ baseModel, trainingDataset, config: config(...options) });
}

async function ended(ai, job) {
  while (['JOB_STATE_PENDING', 'JOB_STATE_QUEUED', 'JOB_STATE_RUNNING'].includes(job.state)) {
    await new Promise((resolve) => setTimeout(resolve, 200));
    job = await ai.tunings.get({ name: job.name });
  }
  return job;
}

async function all(pager) {
  const found = [];
  for await (const one of pager) found.push(one.name);
  return found;
}

const ai = signIn(stage.key);
const stranger = signIn(stage.stranger_key);

await works('ai.models.list', async () => {
  assert((await all(await ai.models.list())).includes(BASE), BASE);
});
await works('ai.models.get', async () => {
  assert((await ai.models.get({ model: BASE })).inputTokenLimit > 0, 'a limit');
}, 'a base model');

if (DROPS_TRAINING_DATA) {
  const texts = ['leave training_dataset out of the request', 'extra_body'];
  await raises('ai.tunings.tune', { status: 400 }, texts, () => tune(ai, BASE, 'numbers', 2, false));
}
const how = DROPS_TRAINING_DATA ? 'the examples in config.httpOptions.extraBody' : '';
const job = await works('ai.tunings.tune', async () => {
  const made = await tune(ai, BASE, 'numbers');
  assert(made.name.startsWith('tunedModels/numbers-'), `a name, not ${made.name}`);
  return made;
}, how);
const name = job?.name;
await works('ai.tunings.get', async () => {
  const done = await ended(ai, job);
  assert(done.state === 'JOB_STATE_SUCCEEDED', `success, not ${done.state}`);
  assert(done.tunedModel.model === name && done.baseModel === BASE, 'its models');
}, 'until JOB_STATE_SUCCEEDED');
await works('ai.tunings.tune', async () => {
  const child = await ended(ai, await tune(ai, name, 'child'));
  assert(child.state === 'JOB_STATE_SUCCEEDED', `success, not ${child.state}`);
}, 'from a tuned model');
await works('ai.tunings.cancel', async () => {
  const long = await tune(ai, BASE, 'long', 1000);
  for (let started = false; !started; ) {
    await new Promise((resolve) => setTimeout(resolve, 100));
    const response = await fetch(`${stage.url}/v1beta/${long.name}?key=${stage.key}`);
    started = Boolean((await response.json()).tuningTask.snapshots);
  }
  await ai.tunings.cancel({ name: long.name });
  const done = await ended(ai, long);
  assert(done.state === 'JOB_STATE_SUCCEEDED', `the weights so far, not ${done.state}`);
});
if (DROPS_TRAINING_DATA && major > 1) {
  await clientRefuses('ai.tunings.list', 'only supported', async () => all(await ai.tunings.list()));
} else {
  await works('ai.tunings.list', async () => {
    assert((await all(await ai.tunings.list({ config: { pageSize: 2 } }))).includes(name), name);
  });
}

const answer = await works('ai.models.generateContent', async () => {
  const response = await ai.models.generateContent({ model: name, contents: '7', config: GREEDY });
  assert(response.text && response.usageMetadata.totalTokenCount > 0, 'an answer');
  return response.text;
});
await works('ai.models.generateContentStream', async () => {
  let text = '';
  const stream = await ai.models.generateContentStream({ model: name, contents: '7', config: GREEDY });
  for await (const chunk of stream) text += chunk.text ?? '';
  assert(text === answer, `${answer}, not ${text}`);
});
await works('ai.models.generateContent', async () => {
  const config = { ...GREEDY, systemInstruction: 'Count.' };
  assert((await ai.models.generateContent({ model: name, contents: '7', config })).candidates.length, 'an answer');
}, 'with a system instruction');
await works('ai.chats.create().sendMessage', async () => {
  const chat = ai.chats.create({ model: name, config: GREEDY });
  await chat.sendMessage({ message: '7' });
  await chat.sendMessage({ message: '8' });
  assert(chat.getHistory().length === 4, 'four turns');
}, 'two turns');
await works('ai.models.countTokens', async () => {
  assert((await ai.models.countTokens({ model: name, contents: 'seven eight' })).totalTokens > 2, 'tokens');
});
await works('ai.models.embedContent', async () => {
  const { embeddings } = await ai.models.embedContent({ model: BASE, contents: ['seven', 'eight'] });
  assert(embeddings.length === 2 && embeddings[0].values.length > 1, 'two embeddings');
});

await works('ai.models.list({queryBase: false})', async () => {
  assert((await all(await ai.models.list({ config: { queryBase: false } }))).includes(name), name);
});
await works('ai.models.list({pageSize: 10})', async () => {
  const pager = await signIn(stage.shelf_key).models.list({ config: { queryBase: false, pageSize: 10 } });
  const names = new Set(await all(pager));
  assert(names.size === stage.shelf_size, `${stage.shelf_size} models, not ${names.size}`);
}, '25 models on three pages');
await works('ai.models.get', async () => {
  const model = await ai.models.get({ model: name });
  assert(model.displayName === 'numbers' && model.tunedModelInfo.baseModel === BASE, 'the model');
});
await works('ai.models.update', async () => {
  await ai.models.update({ model: name, config: { displayName: 'counts', description: 'counts on' } });
  const model = await ai.models.get({ model: name });
  assert(model.displayName === 'counts' && model.description === 'counts on', 'the change');
});

const KIND = ApiError ? { name: 'ApiError' } : {};
await raises('ai.tunings.tune', { ...KIND, status: 400 }, ['batch_size', 'INVALID_ARGUMENT'], () =>
  ai.tunings.tune({ baseModel: BASE, trainingDataset, config: { ...config('numbers'), batchSize: -1 } }));
await raises('ai.models.generateContent', { ...KIND, status: 404 }, ['NOT_FOUND'], () =>
  ai.models.generateContent({ model: 'none-such', contents: '7' }));
await raises('ai.tunings.get', { ...KIND, status: 403 }, ['PERMISSION_DENIED'], () => stranger.tunings.get({ name }));
await raises('ai.models.generateContentStream', { ...KIND, status: 403 }, ['PERMISSION_DENIED'], async () => {
  for await (const _ of await stranger.models.generateContentStream({ model: name, contents: '7' }));
});
await raises('ai.models.get', { ...KIND, status: 400 }, ['API key not valid'], () =>
  signIn('none').models.get({ model: name }));
await works('new GoogleGenAI({httpOptions: {headers}})', async () => {
  const headers = { Authorization: `Bearer ${stage.token}`, 'x-goog-user-project': 'my-project-id' };
  assert((await signIn('dummy', headers).models.get({ model: name })).name === name, name);
}, 'an access token beside a dummy key');
await works('ai.models.delete', () => ai.models.delete({ model: name }));
await raises('ai.models.get', { ...KIND, status: 404 }, ['does not exist'], () => ai.models.get({ model: name }));
