"""Ask the model in this folder: python ask.py "..." (pip install onnxruntime-genai onnxruntime-ep-webgpu)."""

import json
import sys
from pathlib import Path

import onnxruntime_ep_webgpu as webgpu
import onnxruntime_genai as og

STEP = 30  # some GPUs read 32 tokens and more at once otherwise: onnxruntime#28520
folder = Path(__file__).parent
template = json.loads((folder / "inference_model.json").read_text("utf-8"))["PromptTemplate"]
og.register_execution_provider_library("webgpu", webgpu.get_library_path())
model = og.Model(str(folder))
tokenizer = og.Tokenizer(model)
tokens = tokenizer.encode(template["prompt"].replace("{Content}", sys.argv[1]))
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(tokens) + 256)
generator, stream = og.Generator(model, params), tokenizer.create_stream()
for start in range(0, len(tokens), STEP):
    generator.append_tokens(tokens[start : start + STEP])
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
print()
