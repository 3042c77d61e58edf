/* The model of this folder in a browser, by ONNX Runtime Web: greedy, one question at a time.

   const model = await load((ratio) => …);         // reads the folder; model.device says what computes
   for await (const {text, tokens} of model.answer("where is Chicago?", signal)) …  // the answer so far
*/
import * as ort from "./ort.webgpu.min.mjs";
import { Tokenizer } from "./tokenizers.min.mjs";

const FOLDER = new URL("../", import.meta.url);
const STEP = 30;  // tokens: some GPUs read 32 and more at once otherwise (onnxruntime#28520)
const LONGEST = 256;  // tokens of an answer
const WASM_HOLDS = 2 ** 31;  // bytes of weights: it has 4 GiB, and packs some of them anew beside the old
const AS_IT_IS = {skip_special_tokens: true, clean_up_tokenization_spaces: false};
const ARRAYS = {float32: Float32Array, float16: globalThis.Float16Array ?? Uint16Array};

ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;
if (!globalThis.crossOriginIsolated) ort.env.wasm.numThreads = 1;  // threads need a server's leave
ort.env.logLevel = "error";

/** Read the folder and make it ready. Raises Error, whose message is for the page. */
export async function load(progress) {
  const {graphs, data, room, float16} = await json("page/model.json");
  const lacks = await whyNoWebGPU(float16);
  const device = lacks ? "wasm" : "webgpu";
  const bytes = Object.values({...data, ...graphs[device]}).reduce((sum, size) => sum + size);
  if (lacks && bytes > WASM_HOLDS) {
    throw new Error(`${(bytes / 1e9).toFixed(1)} GB are too much for wasm, and ${lacks}: take a browser with WebGPU.`);
  }
  const config = (await json("genai_config.json")).model;
  const {Name: name, PromptTemplate: {prompt}} = await json("inference_model.json");
  const tokenizer = new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json"));
  let got = 0;
  const tell = (count) => progress((got += count) / bytes);
  const externalData = [];
  for (const [path, size] of Object.entries(data)) externalData.push({path, data: await binary(path, size, tell)});
  const [[graph, size]] = Object.entries(graphs[device]);
  const session = await ort.InferenceSession.create(await binary(graph, size, tell), {
    executionProviders: [device],
    externalData,
    preferredOutputLocation: lacks ? "cpu" : keptOnTheGPU(config),
    logSeverityLevel: 3,  // warnings are of nodes that the GPU leaves to the processor
  }).catch((error) => {
    const helps = lacks ? "close other tabs, or take a browser with WebGPU" : "?device=wasm in the address computes without it";
    throw new Error(`${lacks ? "wasm" : "WebGPU"} cannot open the model: ${helps}. (${error.message ?? error})`);
  });
  const threads = ort.env.wasm.numThreads;
  const computes = lacks ? `wasm${threads > 1 ? ` in ${threads} threads` : ""} (${lacks})` : "WebGPU";
  return new Model({session, device: computes, name, config, prompt, tokenizer, room});
}

/** Say why WebGPU is not to be used, "" where it is; ?device=wasm and ?device=webgpu in the address decide. */
async function whyNoWebGPU(float16) {
  const asked = new URLSearchParams(globalThis.location?.search).get("device");
  if (asked === "wasm") return "the address asks for it";
  if (!globalThis.isSecureContext) return "WebGPU needs https, or a server on 127.0.0.1";
  if (!navigator.gpu) return "this browser has no WebGPU";
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  if (!adapter) return "this browser finds no GPU for WebGPU";
  if (float16 && !adapter.features.has("shader-f16")) return "this GPU's driver has no float16";
  if (adapter.info?.isFallbackAdapter && asked !== "webgpu") return "the processor stands in for a GPU here";
  return "";
}

/** Return what ONNX Runtime leaves on the GPU from token to token: keys and values. */
function keptOnTheGPU(config) {
  const names = cacheNames(config).map(([, present]) => [present, "gpu-buffer"]);
  return Object.fromEntries([...names, [config.decoder.outputs.logits, "cpu"]]);
}

/** Return the names of keys and values as the graph takes them, and as it gives them. */
function cacheNames({decoder: {inputs, outputs, num_hidden_layers: layers}}) {
  const pairs = [[inputs.past_key_names, outputs.present_key_names], [inputs.past_value_names, outputs.present_value_names]];
  return Array.from({length: layers}, (_, layer) => pairs.map((names) => names.map((name) => name.replace("%d", layer)))).flat();
}

class Model {
  constructor(parts) {
    Object.assign(this, parts);
    this.ends = new Set([this.config.eos_token_id].flat());
    this.types = Object.fromEntries(this.session.inputMetadata.map(({name, type}) => [name, type]));
  }

  /** Yield the answer as it grows: its text, its tokens. It ends by itself, at its longest, or by the signal. */
  async* answer(question, signal) {
    const asked = this.prompt.split("{Content}").join(question);
    const prompt = this.tokenizer.encode(asked, {add_special_tokens: false}).ids;
    if (prompt.length >= this.room) {
      throw new Error(`The question has ${prompt.length} tokens, and the model reads fewer than ${this.room}: ask a shorter one.`);
    }
    const most = Math.min(LONGEST, this.room - prompt.length);
    const tokens = [];
    let cache = this.emptyCache(), next;
    try {
      for (let place = 0; place < prompt.length; place += STEP) {
        await pause();
        if (signal?.aborted) return;
        ({next, cache} = await this.read(prompt.slice(place, place + STEP), place, cache));
      }
      while (true) {
        tokens.push(next);
        const ended = this.ends.has(next), cut = !ended && tokens.length === most;
        yield {tokens, text: this.tokenizer.decode(tokens, AS_IT_IS), cut};
        if (ended || cut) return;
        await pause();
        if (signal?.aborted) return;
        ({next, cache} = await this.read([next], prompt.length + tokens.length - 1, cache));
      }
    } finally {
      Object.values(cache).forEach((tensor) => tensor.dispose());
    }
  }

  /** Let the graph read tokens behind those in the cache; return the likeliest next one and the new cache. */
  async read(tokens, place, cache) {
    const {inputs, outputs} = this.config.decoder;
    const results = await this.session.run({
      [inputs.input_ids]: integers(tokens),
      [inputs.attention_mask]: integers(Array(place + tokens.length).fill(1)),
      ...cache,
    });
    const logits = results[outputs.logits];
    const next = likeliest(logits);
    logits.dispose();
    Object.values(cache).forEach((tensor) => tensor.dispose());
    return {next, cache: Object.fromEntries(cacheNames(this.config).map(([past, present]) => [past, results[present]]))};
  }

  /** Return keys and values of no token. */
  emptyCache() {
    const {num_key_value_heads: heads, head_size: size} = this.config.decoder;
    const empty = (type) => new ort.Tensor(type, new ARRAYS[type](0), [1, heads, 0, size]);
    return Object.fromEntries(cacheNames(this.config).map(([past]) => [past, empty(this.types[past])]));
  }
}

function integers(values) {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

/** Return the likeliest token after the last one. */
function likeliest({data, dims, type}) {
  let last = data.subarray(data.length - dims.at(-1));
  // the bits of float16, where a browser has no such numbers, in an order that is theirs
  if (type === "float16" && data instanceof Uint16Array) last = last.map((bits) => (bits & 0x8000 ? ~bits : bits | 0x8000));
  return last.reduce((best, value, token) => (value > last[best] ? token : best), 0);
}

/** Let the page draw, and hear who presses a key. */
function pause() {
  return new Promise((go) => {
    const {port1, port2} = new MessageChannel();
    port1.onmessage = () => { port1.close(); go(); };
    port2.postMessage(0);
  });
}

async function json(name) {
  return (await ask(name)).json();
}

/** Return a file's bytes, and tell of those that come. */
async function binary(name, size, tell) {
  const reader = (await ask(name)).body.getReader();
  const content = new Uint8Array(size);
  let got = 0;
  for (let part; !(part = await reader.read()).done; got += part.value.length) {
    if (got + part.value.length > size) break;
    content.set(part.value, got);
    tell(part.value.length);
  }
  if (got !== size) throw new Error(`${name} is not what was written here: copy the whole folder again.`);
  return content;
}

async function ask(name) {
  const response = await fetch(new URL(name, FOLDER), {credentials: "omit"}).catch(() => null);
  if (!response) throw new Error("The server does not answer: is it still running?");
  if (!response.ok) throw new Error(`${name} is missing (status ${response.status}): copy the whole folder.`);
  return response;
}
