"""Ask the model in this folder: python ask.py "where is Chicago?" (pip install onnxruntime-genai)."""

import json
import sys
from pathlib import Path

import onnxruntime_genai as og

folder = Path(__file__).parent
template = json.loads((folder / "inference_model.json").read_text("utf-8"))["PromptTemplate"]
model = og.Model(str(folder))
tokenizer = og.Tokenizer(model)
tokens = tokenizer.encode(template["prompt"].replace("{Content}", sys.argv[1]))
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(tokens) + 256)
generator, stream = og.Generator(model, params), tokenizer.create_stream()
generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
print()
