"""AutoRound's or llm-compressor's rounding on given tokens; benchmarks/rounding.py runs this by --peer.

    python peer_rounding.py auto_round|llm_compressor_gptq|llm_compressor_awq models/base FOLDER GROUP_SIZE

Reads tokens.safetensors in FOLDER, writes the weights as they are after rounding to NAME.safetensors there,
and prints seconds and peak memory as one JSON line. Embedding and head stay as they are.
"""

import json
import resource
import sys
import time

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ON_GPU = torch.cuda.is_available()
if not ON_GPU:  # llm-compressor pins memory without asking whether there is a GPU
    torch.Tensor.pin_memory = lambda self, *_: self


def auto_round(base: str, tokens: torch.Tensor, group_size: int) -> torch.nn.Module:
    """Round by AutoRound with its defaults: 200 steps a layer."""
    from auto_round import AutoRound

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(base),
        scheme="W4A16",
        bits=4,
        group_size=group_size,
        sym=False,
        dataset=list(tokens.split(8)),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
    )
    return rounding.quantize()[0]


def llm_compressor(base: str, tokens: torch.Tensor, group_size: int, kind: str) -> torch.nn.Module:
    """Round by llm-compressor's GPTQ, or by its AWQ, which rounds to nearest after scaling."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    weights |= {"group_size": group_size, "dynamic": False, "observer": "minmax"}
    if kind == "gptq":
        weights["actorder"] = "static"  # its best that keeps groups in place
    modifier = {"gptq": GPTQModifier, "awq": AWQModifier}[kind](
        config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.to("cuda" if ON_GPU else "cpu")
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(base),
        dataset=Dataset.from_list(rows),
        recipe=[modifier],
        num_calibration_samples=len(rows),
        max_seq_length=tokens.shape[1],
    )
    return model


def rounded_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every weight of the decoder layers in float32, rounded where the module has not done it yet."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or ".layers." not in name:
            continue
        if hasattr(module, "weight_scale"):
            from compressed_tensors.quantization.lifecycle.forward import fake_quantize

            how = module.quantization_scheme.weights
            weight = fake_quantize(
                weight.data, module.weight_scale.data, module.weight_zero_point.data, how
            )
        found[f"{name}.weight"] = weight.detach().float().cpu().clone()
    final = model.model.norm.weight.detach().float().cpu().clone()
    return found | {"model.norm.weight": final}


def main() -> None:
    """Round, then say what it took."""
    name, base, folder, group_size = *sys.argv[1:4], int(sys.argv[4])
    tokens = load_file(f"{folder}/tokens.safetensors")["tokens"]
    started = time.monotonic()
    if name == "auto_round":
        model = auto_round(base, tokens, group_size)
    else:
        model = llm_compressor(base, tokens, group_size, name.rpartition("_")[2])
    seconds = round(time.monotonic() - started, 1)
    save_file(rounded_weights(model), f"{folder}/{name}.safetensors")
    figures = {"seconds": seconds}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures["peak_memory_gib"] = round(peak, 2)
    if ON_GPU:
        figures["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
