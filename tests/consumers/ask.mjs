// node ask.mjs MODELS NAME TASK DTYPE < texts.json: what transformers.js says to every text, from local files alone
import { readFileSync } from 'node:fs';
import { env, pipeline } from '@huggingface/transformers';

const [models, name, task, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = models;
const texts = JSON.parse(readFileSync(0, 'utf8'));
const ask = await pipeline(task, name, { dtype });
const said = [];
for (const text of texts) {
  const [answer] = await ask(text);
  said.push(answer.label ?? answer.generated_text);
}
console.log(JSON.stringify(said));
