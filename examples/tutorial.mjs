// The tutorial with JavaScript's own fetch: tune a model that continues a number with the next one, and ask it.
// Start `tunesmith serve` first, then: access_token=$(tunesmith token admin@localhost) node tutorial.mjs
const baseUrl = process.env.base_url ?? 'http://127.0.0.1:8080';
const examples = [
  ['1', '2'],
  ['3', '4'],
  ['-3', '-2'],
  ['twenty two', 'twenty three'],
  ['two hundred', 'two hundred one'],
  ['ninety nine', 'one hundred'],
  ['8', '9'],
  ['-98', '-97'],
  ['1,000', '1,001'],
  ['10,100,000', '10,100,001'],
  ['thirteen', 'fourteen'],
  ['eighty', 'eighty one'],
  ['one', 'two'],
  ['three', 'four'],
  ['seven', 'eight'],
];

async function call(method, path, body) {
  const response = await fetch(`${baseUrl}/v1beta/${path}`, {
    method,
    headers: { Authorization: `Bearer ${process.env.access_token}`, 'Content-Type': 'application/json' },
    body: body && JSON.stringify(body),
  });
  const answer = await response.json();
  if (answer.error) throw new Error(answer.error.message);
  return answer;
}

let operation = await call('POST', 'tunedModels', {
  displayName: 'number generator',
  baseModel: 'models/gemini-1.5-flash-001-tuning',
  tuningTask: {
    hyperparameters: { batchSize: 4, learningRate: 0.001, epochCount: 5 },
    trainingData: { examples: { examples: examples.map(([textInput, output]) => ({ textInput, output })) } },
  },
});
const { tunedModel } = operation.metadata;
console.log(`tuning ${tunedModel}`);

while (!operation.done) {
  await new Promise((resolve) => setTimeout(resolve, 1000));
  operation = await call('GET', operation.name);
  const last = operation.metadata.snapshots?.at(-1);
  if (last) console.log(`step ${last.step}/${operation.metadata.totalSteps}  loss ${last.meanLoss.toFixed(3)}`);
}

for (const text of ['5', 'sixty six', 'LXIII', '六']) {
  const answer = await call('POST', `${tunedModel}:generateContent`, { contents: [{ parts: [{ text }] }] });
  console.log(`${text} -> ${answer.candidates[0].content.parts[0].text}`);
}
