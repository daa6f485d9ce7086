// @google/generative-ai, the older JavaScript client: it asks tuned models and does not make them.
import { assert, load, raises, stage, works } from './calls.mjs';

const { GoogleGenerativeAI, GoogleGenerativeAIFetchError } = await load('@google/generative-ai');
const BASE = 'models/gemini-1.5-flash-001-tuning';
const generationConfig = { temperature: 0, maxOutputTokens: 8 };

function model(name, key = stage.shelf_key, options = {}) {
  return new GoogleGenerativeAI(key).getGenerativeModel({ model: name, ...options }, { baseUrl: stage.url });
}

const tuned = model(stage.shelf_model, stage.shelf_key, { generationConfig });
const answer = await works('model.generateContent', async () => {
  const { response } = await tuned.generateContent('7');
  assert(response.usageMetadata.totalTokenCount > 0, 'a count');
  return response.text();
});
await works('model.generateContentStream', async () => {
  const { stream, response } = await tuned.generateContentStream('7');
  let text = '';
  for await (const chunk of stream) text += chunk.text();
  assert(text === answer && (await response).text() === answer, `${answer}, not ${text}`);
});
await works('model.generateContent', async () => {
  assert((await model(BASE, stage.shelf_key, { generationConfig }).generateContent('7')).response.candidates, 'an answer');
}, 'a base model');
await works('model.generateContent', async () => {
  const told = model(stage.shelf_model, stage.shelf_key, { generationConfig, systemInstruction: 'Count.' });
  assert((await told.generateContent('7')).response.candidates, 'an answer');
}, 'with a system instruction');
await works('model.startChat().sendMessage', async () => {
  const chat = tuned.startChat();
  await chat.sendMessage('7');
  await chat.sendMessage('8');
  assert((await chat.getHistory()).length === 4, 'four turns');
}, 'two turns');
await works('model.countTokens', async () => {
  assert((await tuned.countTokens('seven eight')).totalTokens > 2, 'tokens');
}, 'a string: contents');
await works('model.countTokens', async () => {
  const contents = [{ role: 'user', parts: [{ text: 'seven eight' }] }];
  const generateContentRequest = { contents };
  assert((await tuned.countTokens({ generateContentRequest })).totalTokens > 2, 'tokens');
}, 'generateContentRequest');
await works('model.embedContent', async () => {
  assert((await model(BASE).embedContent('seven')).embedding.values.length > 1, 'an embedding');
});
await works('model.batchEmbedContents', async () => {
  const requests = ['seven', 'eight'].map((text) => ({ content: { role: 'user', parts: [{ text }] } }));
  assert((await model(BASE).batchEmbedContents({ requests })).embeddings.length === 2, 'two embeddings');
});

async function refused(call, status, text, name, key, request = '7') {
  await raises(call, { status }, [text], async () => {
    try {
      await model(name, key).generateContent(request);
    } catch (error) {
      assert(error instanceof GoogleGenerativeAIFetchError, `GoogleGenerativeAIFetchError, not ${error}`);
      throw error;
    }
  });
}
await refused('model.generateContent', 404, 'is not found for API version', 'models/none-such');
await refused('model.generateContent', 403, 'You do not have permission', stage.shelf_model, stage.stranger_key);
await refused('model.generateContent', 400, 'API key not valid', stage.shelf_model, 'none');
const wrong = { contents: [{ role: 'user', parts: [{ text: '7' }] }], generationConfig: { temperature: 9 } };
await refused('model.generateContent', 400, 'temperature', stage.shelf_model, stage.shelf_key, wrong);
await raises('model.generateContentStream', { status: 403 }, ['You do not have permission'], () =>
  model(stage.shelf_model, stage.stranger_key).generateContentStream('7'));
