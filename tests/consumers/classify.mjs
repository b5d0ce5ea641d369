// node classify.mjs MODELS NAME DTYPE < texts.json: the label of every text by transformers.js, from local files alone
import { readFileSync } from 'node:fs';
import { env, pipeline } from '@huggingface/transformers';

const [models, name, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = models;
const texts = JSON.parse(readFileSync(0, 'utf8'));
const classify = await pipeline('text-classification', name, { dtype });
const labels = [];
for (const text of texts) labels.push((await classify(text))[0].label);
console.log(JSON.stringify(labels));
